/**
 * A TCP server that writes a greeting to every client and closes the connection.
 *
 * Run it, and be its client from another terminal:
 *
 * ```sh
 * deno run --allow-net server.ts
 * nc localhost 9000
 * ```
 *
 * Or import {@linkcode serve}; many a classic service is one line of it:
 *
 * ```ts
 * import { serve } from "./server.ts";
 *
 * // Quote of the day (RFC 865), daytime (RFC 867), what is my address.
 * await using quote = serve({ port: 0, greeting: "Less is more.\r\n" });
 * await using time = serve({ port: 0, greeting: () => `${new Date()}\r\n` });
 * await using you = serve({ port: 0, greeting: (a) => `${a.hostname}\n` });
 * ```
 *
 * This file tells the eight steps of a socket server in their order: `serve()`
 * is the first four, the class `Server` the others. What comes after them is
 * what they take for granted, the options, and the command line.
 *
 * @module
 */

// ============== Steps 1 to 4: socket, address, bind, listen ==============

/**
 * Listens on TCP and greets every client until it is told to stop. Whatever a
 * client does, the others are greeted. Prints nothing.
 *
 * @example A server and its client
 * ```ts
 * import { serve } from "./server.ts";
 *
 * await using server = serve({ port: 0, greeting: "Hello\n" });
 * const conn = await Deno.connect({ port: server.addr.port });
 * console.log(await new Response(conn.readable).text());
 * ```
 *
 * @throws {TypeError | RangeError} Names a bad option; nothing was opened.
 * @throws {Error} One of `Deno.errors`: the address cannot be listened on.
 */
export function serve(options: ServeOptions = {}): GreetingServer {
  const settings = checkOptions(options);
  settings.signal?.throwIfAborted();
  // One call does all four: socket(), with the family that the address has,
  // bind() to the address, and listen(), from when on the kernel answers clients
  // by itself and queues them.
  const listener = Deno.listen({
    hostname: settings.hostname,
    port: settings.port,
    tcpBacklog: settings.backlog,
    reusePort: settings.reusePort,
  });
  return new Server(listener, settings);
}

// ========= Steps 5 to 8: accept, read and write, close, shut down =========

/**
 * How long a greeted client may take to close its side, in milliseconds; if that
 * is less, the `timeout`. To close at once would reset who is still sending, and
 * to wait for long would keep a place from others.
 */
const LINGER = 1000;

/** The pause after a failed accept(), in milliseconds. */
const ACCEPT_RETRY = 10;

/**
 * A stop takes the kernel's queue for empty when in so many turns of the event
 * loop nothing has happened. One turn is no proof: its timers come before its I/O,
 * and where thousands of operations are ready, accept() has to wait for its turn.
 */
const QUIET_TURNS = 3;

/** Where all that clients send is thrown. One is enough: nobody looks. */
const SINK = new Uint8Array(262144);

/** One side of a TCP connection, from accept() to close(). */
interface Connection {
  readonly conn: Deno.TcpConn;
  /**
   * `greeting`: its greeting is awaited or written. `lingering`: it has been
   * greeted, and its client has not closed yet. `closed`: nothing more happens.
   */
  state: "greeting" | "lingering" | "closed";
  /** How many more ticks it may stay in this state. */
  ticks: number;
  /** Its place in the list of open connections. */
  index: number;
  /** When it was accepted, on the clock of `performance.now()`. */
  readonly acceptedAt: number;
  /** Bytes of its greeting that the kernel has taken. */
  bytes: number;
}

/** The state of a running server, then its steps in their order. */
class Server implements GreetingServer {
  readonly addr: Deno.NetAddr;
  readonly finished: Promise<void>;
  readonly #listener: Deno.TcpListener;
  readonly #settings: Settings;
  /** The length of a tick, in milliseconds. */
  readonly #tick: number;

  /** The open connections, in no order. */
  #open: Connection[] = [];
  /** The timer that ticks while there are any. */
  #ticker?: ReturnType<typeof setInterval> | undefined;
  /** How many first writes of the present group are in flight. */
  #writing = 0;
  /** What starts each first write of the next group. */
  #nextGroup: (() => void)[] = [];
  /** How many accepts, reads and writes have completed: a stop watches it. */
  #completed = 0;
  /** Whether the accept loop waits for room or descriptors, and not in accept(). */
  #paused = false;
  /** Called when a connection has ended: wakes what waits for that. */
  #wake = () => {};
  /** Since a stop was asked for: resolves when the listener is closed. */
  #stopping?: Promise<void>;

  constructor(listener: Deno.TcpListener, settings: Settings) {
    this.addr = listener.addr as Deno.NetAddr;
    this.#listener = listener;
    this.#settings = settings;
    this.#tick = Math.min(250, Math.ceil(settings.timeout / 4));
    settings.signal?.addEventListener("abort", this.#abort);
    this.finished = this.#run();
  }

  get connections(): number {
    return this.#open.length;
  }

  /** From the first accept() to the end of the last connection. */
  async #run() {
    await this.#accept();
    while (this.#open.length > 0) await this.#connectionEnds();
    await this.#stopping;
    await sleep(0); // what was cut off has yet to reject
    clearInterval(this.#ticker);
    this.#settings.signal?.removeEventListener("abort", this.#abort);
  }

  /** Step 5: accept, until the listener is closed. */
  async #accept() {
    while (true) {
      try {
        for await (const conn of this.#listener) {
          this.#completed++;
          this.#serve(conn); // not awaited: clients are served side by side
          while (this.#open.length >= this.#settings.maxConnections) {
            await this.#pause(this.#connectionEnds());
          }
        }
        return;
      } catch (error) {
        this.#completed++;
        // A client that was gone before it was accepted is nobody's loss. A plain
        // loop ends here, at any error; but the listener is as good as before.
        if (error instanceof Deno.errors.NotConnected) continue;
        if (error instanceof Deno.errors.ConnectionAborted) continue;
        // Out of descriptors or memory, say. The client waits in the queue.
        notify(this.#settings.onAcceptError, error as Error);
        await this.#pause(sleep(ACCEPT_RETRY));
      }
    }
  }

  /** Steps 6 and 7: the life of a connection. */
  async #serve(conn: Deno.TcpConn) {
    const { greeting, timeout, signal } = this.#settings;
    const connection = this.#enter(conn);
    try {
      signal?.throwIfAborted(); // it was accepted as the abort came
      const message = greeting instanceof Uint8Array
        ? greeting
        : toBytes(await greeting(clientOf(conn)));

      // Step 6: write. A write may be short, so it is finished.
      connection.bytes = await this.#firstWrite(conn, message);
      // Read, and throw away. This begins before all is written: a client that
      // sends more than the buffers hold reads nothing until it is through.
      const drained = this.#drain(conn);
      while (connection.bytes < message.length) {
        const rest = message.subarray(connection.bytes);
        connection.bytes += await conn.write(rest);
        this.#completed++;
      }
      if (connection.state === "closed") return; // cut off in the same moment
      connection.state = "lingering";
      connection.ticks = this.#ticksFor(Math.min(timeout, LINGER));
      this.#report(connection);

      // Half-close, so that the client sees the end; close when it has closed
      // too. To close with data unread sends RST, and that can destroy what the
      // client has yet to read (RFC 9112, section 9.6, tells the same of HTTP).
      await conn.closeWrite();
      await drained;
      this.#close(connection);
    } catch (error) {
      this.#close(connection, error);
    }
  }

  /**
   * Reads and throws away all that comes, until the client closes or is gone. With
   * a pause after every read, or four clients that flood the server would keep the
   * others waiting for a quarter of a second.
   */
  async #drain(conn: Deno.TcpConn) {
    try {
      while (await conn.read(SINK) !== null) {
        this.#completed++;
        await sleep(0);
      }
    } catch {
      // Reset by the client, or cut off: nothing more will come.
    }
    this.#completed++;
  }

  /**
   * Step 7: close, and forget. Called again it does nothing, so that a connection
   * may be cut off wherever it is: what it waits for rejects, or is never heard.
   */
  #close(connection: Connection, reason?: unknown) {
    const { conn, state, index } = connection;
    if (state === "closed") return;
    connection.state = "closed";
    conn.close();
    const last = this.#open.pop()!;
    if (last !== connection) {
      this.#open[index] = last; // takes its place
      last.index = index;
    }
    this.#wake();
    if (state === "greeting") this.#report(connection, toError(reason));
  }

  /** Step 8: shut the server down. A field, so that it can be handed on alone. */
  readonly shutdown = (): Promise<void> => {
    this.#stopping ??= this.#closeListener();
    return this.finished;
  };

  /**
   * Whoever is in the kernel's queue is connected, and gets the greeting: so it
   * goes on accepting until nothing happens, or for the timeout.
   */
  async #closeListener() {
    const end = performance.now() + this.#settings.timeout;
    let quiet = 0;
    while (quiet < QUIET_TURNS && performance.now() < end) {
      const before = this.#completed;
      await sleep(0);
      // While it waits for room or descriptors, a turn proves nothing.
      quiet = this.#paused || this.#completed > before ? 0 : quiet + 1;
    }
    this.#listener[Symbol.dispose](); // close(), but no error if aborted
  }

  /** Shuts down at once. */
  readonly #abort = () => {
    this.#listener[Symbol.dispose]();
    for (const connection of [...this.#open]) {
      this.#close(connection, this.#settings.signal?.reason);
    }
  };

  readonly [Symbol.asyncDispose] = this.shutdown;

  // ------- What the steps take for granted: waiting, groups, deadlines -------

  /** Lets the accept loop wait for something else than a client. */
  async #pause(until: Promise<void>) {
    this.#paused = true;
    await until;
    this.#paused = false;
  }

  #connectionEnds(): Promise<void> {
    return new Promise((resolve) => this.#wake = resolve);
  }

  /**
   * Writes what the kernel takes at once. First writes go in groups: who comes
   * while one group is being written goes with the next. Each at its own time
   * would be unfair: the runtime polls only so many operations a turn, and some
   * would wait for seconds. To hold accept() back instead would let the kernel's
   * queue overflow. A group is short: a first write goes into an empty buffer and
   * waits for no client. Where the kernel lacks the memory, the deadlines of the
   * group's connections bound it.
   */
  async #firstWrite(conn: Deno.TcpConn, message: Uint8Array): Promise<number> {
    if (this.#writing > 0) {
      await new Promise<void>((start) => this.#nextGroup.push(start));
    } else {
      this.#writing = 1;
    }
    try {
      return await conn.write(message);
    } finally {
      this.#completed++;
      this.#writing--;
      if (this.#writing === 0) {
        const group = this.#nextGroup;
        this.#nextGroup = [];
        this.#writing = group.length;
        for (const start of group) start();
      }
    }
  }

  /** Begins a connection's life, and its deadline. */
  #enter(conn: Deno.TcpConn): Connection {
    const connection: Connection = {
      conn,
      state: "greeting",
      ticks: this.#ticksFor(this.#settings.timeout),
      index: this.#open.length,
      acceptedAt: performance.now(),
      bytes: 0,
    };
    this.#open.push(connection);
    this.#ticker ??= setInterval(() => this.#countDown(), this.#tick);
    return connection;
  }

  /**
   * How many ticks take at least so long, though the first may come at once.
   * Deadlines are counted and not read off the clock: a process that was suspended
   * has not ticked, and cuts nobody off for time that it slept itself.
   */
  #ticksFor(milliseconds: number): number {
    return Math.ceil(milliseconds / this.#tick) + 1;
  }

  /** A tick: who has none left is cut off. */
  #countDown() {
    for (const connection of [...this.#open]) {
      connection.ticks--;
      if (connection.ticks > 0) continue;
      const { timeout } = this.#settings;
      const late = new Deno.errors.TimedOut(`not greeted in ${timeout} ms`);
      this.#close(connection, late);
    }
    if (this.#open.length > 0) return;
    clearInterval(this.#ticker);
    this.#ticker = undefined;
  }

  /** Tells how greeting a client went. */
  #report({ conn, bytes, acceptedAt }: Connection, error?: Error) {
    const milliseconds = performance.now() - acceptedAt;
    const remoteAddr = clientOf(conn);
    const outcome = { remoteAddr, bytes, milliseconds, error };
    notify(this.#settings.onOutcome, outcome);
  }
}

// ============================== Small helpers ==============================

function sleep(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

/** Calls a callback. What that throws is an uncaught error, as of an event's. */
function notify<T>(callback: ((value: T) => void) | undefined, value: T) {
  try {
    callback?.(value);
  } catch (error) {
    reportError(error);
  }
}

/** The client's address; an IPv4 client of an IPv6 socket has its own again. */
function clientOf({ remoteAddr }: Deno.TcpConn): Deno.NetAddr {
  if (!remoteAddr.hostname.startsWith("::ffff:")) return remoteAddr;
  return { ...remoteAddr, hostname: remoteAddr.hostname.slice(7) };
}

function toError(reason: unknown): Error {
  if (reason instanceof Error) return reason;
  return new Error("what was thrown is no Error", { cause: reason });
}

/** A copy, so that later changes of the original change nothing. */
function toBytes(greeting: Greeting): Uint8Array {
  if (typeof greeting === "string") return new TextEncoder().encode(greeting);
  if (greeting instanceof Uint8Array) return new Uint8Array(greeting);
  throw new TypeError("greeting must be a string or a Uint8Array");
}

// ================================= Options =================================

/** What a client is sent: bytes as they are, text as UTF-8, nothing added. */
export type Greeting = string | Uint8Array;

/** Makes the greeting for a client. Only that connection fails if it throws. */
export type GreetingFunction = (
  client: Deno.NetAddr,
) => Greeting | Promise<Greeting>;

/** Options of {@linkcode serve}. */
export interface ServeOptions {
  /** Address to listen on; `::` is IPv6 and IPv4. Default: `0.0.0.0`. */
  hostname?: string | undefined;
  /** TCP port, 0 for any free one. Default: 9000. */
  port?: number | undefined;
  /**
   * What clients are sent, or a function of the client's address that returns
   * it or a promise of it. Bytes are copied. Where the function throws, rejects
   * or does not answer in time, that one connection fails. Default:
   * `Hello from server\n`.
   */
  greeting?: Greeting | GreetingFunction | undefined;
  /**
   * Connections that the kernel queues for accept(). It cuts this down to its
   * own maximum, on Linux `net.core.somaxconn`. Default: 65535.
   */
  backlog?: number | undefined;
  /**
   * How long a client may take for its greeting, in milliseconds; who takes
   * longer is cut off. Then it has as long again to close its side, but a second
   * at the most. Default: 5000.
   */
  timeout?: number | undefined;
  /** Connections held at once; more wait in the queue. Default: 10000. */
  maxConnections?: number | undefined;
  /**
   * Share the port with other processes (SO_REUSEPORT, on Linux). Without
   * `"unstable": ["net"]` in its configuration Deno ends the process here, with
   * a line on standard error and no exception. Default: false.
   */
  reusePort?: boolean | undefined;
  /** Aborting it stops the server and closes every connection at once. */
  signal?: AbortSignal | undefined;
  /**
   * Called once for every client, at the moment it has been greeted or could not
   * be. What it throws is an uncaught error, and the server goes on.
   */
  onOutcome?: ((outcome: Outcome) => void) | undefined;
  /**
   * Called when accept() fails, for want of descriptors, say. It is tried again
   * every 10 ms. What this throws is an uncaught error, too.
   */
  onAcceptError?: ((error: Error) => void) | undefined;
}

/** How greeting a client went. What it does afterwards changes nothing. */
export interface Outcome {
  /** The client's address. */
  remoteAddr: Deno.NetAddr;
  /** Bytes of the greeting that the kernel took. */
  bytes: number;
  /** How long that took from accept() on, in milliseconds. */
  milliseconds: number;
  /**
   * Why it did not take all of them: `Deno.errors.TimedOut`, the reason of the
   * abort, what the greeting function threw, or the error of the write.
   */
  error?: Error | undefined;
}

/** A running server. */
export interface GreetingServer extends AsyncDisposable {
  /** The address it listens on, with the real port. */
  readonly addr: Deno.NetAddr;
  /** How many connections are open. */
  readonly connections: number;
  /** Resolves when it no longer listens and every connection has ended. */
  readonly finished: Promise<void>;
  /**
   * Greets the clients that the kernel has already connected (or, where more
   * keep coming, accepts for the timeout), stops listening, lets open
   * connections end and returns `finished`.
   */
  shutdown(): Promise<void>;
}

/**
 * What {@linkcode serve} takes for an option that is left out.
 *
 * @ignore
 */
const DEFAULTS = {
  hostname: "0.0.0.0",
  port: 9000,
  greeting: "Hello from server\n",
  backlog: 65535,
  timeout: 5000,
  maxConnections: 10000,
  reusePort: false,
};

/** The most that listen(2) and a timer take. */
const MAX_INT32 = 2 ** 31 - 1;

/** From where to where each option that is a whole number goes. */
const RANGES = {
  port: [0, 65535],
  backlog: [1, MAX_INT32],
  timeout: [1, MAX_INT32],
  maxConnections: [1, MAX_INT32],
} as const;

/** Options that were checked, with their defaults. */
type Settings = ReturnType<typeof checkOptions>;

function checkOptions(options: ServeOptions) {
  const { greeting = DEFAULTS.greeting } = options;
  return {
    hostname: options.hostname ?? DEFAULTS.hostname,
    port: checkNumber(options, "port"),
    // A fixed greeting is encoded once, not for every client.
    greeting: typeof greeting === "function" ? greeting : toBytes(greeting),
    backlog: checkNumber(options, "backlog"),
    timeout: checkNumber(options, "timeout"),
    maxConnections: checkNumber(options, "maxConnections"),
    reusePort: options.reusePort ?? DEFAULTS.reusePort,
    signal: options.signal,
    onOutcome: options.onOutcome,
    onAcceptError: options.onAcceptError,
  };
}

/** A number out of its range would be taken in silence by what it is handed to. */
function checkNumber(
  options: ServeOptions,
  option: keyof typeof RANGES,
): number {
  const { [option]: value = DEFAULTS[option] } = options;
  const [min, max] = RANGES[option];
  const rule = `${option} must be a whole number from ${min} to ${max}`;
  if (typeof value !== "number") throw new TypeError(rule);
  if (Number.isInteger(value) && value >= min && value <= max) return value;
  throw new RangeError(`${rule}, not ${value}`);
}

// ============================= The command line =============================

/** The version in `deno.json`, which is not there where this file is copied. */
const VERSION = "1.0.0";

const HELP = `Writes a greeting to every TCP client and closes the connection.

Usage: deno run --allow-net server.ts [options]

  -p, --port <port>          TCP port, 0 for any free one (${DEFAULTS.port})
  -H, --hostname <host>      address to listen on (${DEFAULTS.hostname});
                             :: is IPv6 and IPv4
  -g, --greeting <text>      what every client is sent, a newline added where
                             it has none (${DEFAULTS.greeting.trimEnd()});
                             --greeting=- is standard input, byte for byte
  -b, --backlog <n>          connections the kernel queues for accept(); it
                             cuts this down to its own maximum (${DEFAULTS.backlog})
  -t, --timeout <seconds>    how long a client may take for its greeting,
                             such as 0.5 (${DEFAULTS.timeout / 1000})
  -c, --max-connections <n>  connections held at once; more wait (${DEFAULTS.maxConnections})
  -r, --reuse-port           share the port with other processes (Linux)
  -v, --verbose              print a line for every connection
  -h, --help                 print this
  -V, --version              print the version
`;

/** Letter, name, and whether it takes a value, of each flag in the help. */
const FLAGS = [...HELP.matchAll(/-(\w), --(\S+)( <)?/g)];

/** What parseArgs() finds. */
type Values = Record<string, unknown>;

/**
 * Parses a command line. A greeting of `-` stands for standard input.
 *
 * @throws {Error} For an unknown flag, a stray word, a bad or missing value: one
 * line.
 * @ignore
 */
export async function parseFlags(args: string[]): Promise<
  typeof DEFAULTS & { verbose: boolean; help: boolean; version: boolean }
> {
  const { parseArgs } = await import("@std/cli/parse-args");
  const unknown = args.filter((arg) => /^-[^-=][^=]+=/.test(arg)); // -gno=yes
  const { _: words, ...values } = parseArgs(args, {
    alias: Object.fromEntries(FLAGS.map(([, letter, flag]) => [letter, flag!])),
    // No switch is declared as boolean, or --verbose=no would be true.
    string: FLAGS.flatMap(([, , flag, value]) => value ? [flag!] : []),
    unknown: (arg: string) => {
      unknown.push(arg);
      return false;
    },
  });
  unknown.push(...words as string[]); // what follows --

  const greeting = text(values, "greeting", DEFAULTS.greeting);
  const isWhole = greeting === "-" || greeting.endsWith("\n");
  const seconds = DEFAULTS.timeout / 1000;
  const flags = {
    hostname: text(values, "hostname", DEFAULTS.hostname),
    port: number(values, "port", DEFAULTS.port, RANGES.port),
    greeting: isWhole ? greeting : greeting + "\n",
    backlog: number(values, "backlog", DEFAULTS.backlog, RANGES.backlog),
    timeout: Math.round(
      1000 * number(values, "timeout", seconds, [0.001, 2147483]),
    ),
    maxConnections: number(
      values,
      "max-connections",
      DEFAULTS.maxConnections,
      RANGES.maxConnections,
    ),
    reusePort: isOn(values, "reuse-port"),
    verbose: isOn(values, "verbose"),
    help: isOn(values, "help"),
    version: isOn(values, "version"),
  };
  const [arg] = unknown;
  if (arg === undefined) return flags;
  const kind = /^-./.test(arg) ? "unknown flag" : "stray word";
  throw new Error(`${kind} ${JSON.stringify(arg)}`);
}

function isOn(values: Values, flag: string): boolean {
  const value = values[flag] ?? false;
  if (typeof value === "boolean") return value;
  const given = JSON.stringify(value);
  throw new Error(`--${flag} takes no value, and was given ${given}`);
}

function text(values: Values, flag: string, otherwise: string): string {
  const value = (values[flag] ?? otherwise) as string;
  if (value === "") throw new Error(`--${flag} needs a value: --${flag}=...`);
  return value;
}

function number(
  values: Values,
  flag: string,
  otherwise: number,
  [min, max]: readonly [number, number],
): number {
  const value = text(values, flag, `${otherwise}`);
  const [form, kind] = Number.isInteger(min)
    ? [/^\d+$/, "whole number"]
    : [/^\d*\.?\d+$/, "number"];
  if (form.test(value) && +value >= min && +value <= max) return +value;
  const rule = `--${flag} must be a ${kind} from ${min} to ${max}`;
  throw new Error(`${rule}, not ${JSON.stringify(value)}`);
}

/** `host:port`; IPv6 addresses in brackets. */
function hostPort({ hostname, port }: { hostname: string; port: number }) {
  return `${hostname.includes(":") ? `[${hostname}]` : hostname}:${port}`;
}

/** A client's command that works on this machine; `localhost` may be `::1` only. */
function clientFor({ hostname, port }: Deno.NetAddr): string {
  const any: Record<string, string> = { "0.0.0.0": "127.0.0.1", "::": "::1" };
  return `nc ${any[hostname] ?? hostname} ${port}`;
}

function lineFor({ remoteAddr, bytes, milliseconds, error }: Outcome): string {
  const how = error ? `failed, ${error.message}` : "greeted";
  const figures = `${bytes} bytes, ${milliseconds.toFixed(1)} ms`;
  return `${hostPort(remoteAddr)} ${how}: ${figures}`;
}

/** The most that waits to be written to standard error, in UTF-16 units. */
const LOG_LIMIT = 1 << 20;

/** What waits to be written there. */
let log = "";
/** Writes it, while there is any. */
let logging: Promise<void> | undefined;

/**
 * Prints one line to standard error, soon: no greeting and no stop waits for its
 * reader. If that stalls, what there is no room for is dropped.
 */
function say(line: string): void {
  if (log.length + line.length > LOG_LIMIT) return;
  log += line.replace(/\s+/g, " ") + "\n";
  logging ??= writeLog();
}

async function writeLog() {
  while (log !== "") {
    const lines = log;
    log = "";
    await write(Deno.stderr, lines).catch(() => {}); // there is no other place
  }
  logging = undefined;
}

async function write(stream: typeof Deno.stderr, text: string) {
  const bytes = new TextEncoder().encode(text);
  for (let written = 0; written < bytes.length;) {
    try {
      written += await stream.write(bytes.subarray(written));
    } catch (error) {
      // A pipe that another program has made non-blocking is full.
      if (!(error instanceof Deno.errors.WouldBlock)) throw error;
      await sleep(10);
    }
  }
}

async function readGreeting(): Promise<Uint8Array> {
  if (Deno.stdin.isTerminal()) {
    say("Reading the greeting from the terminal; Ctrl-D on a new line ends it");
  }
  const greeting = await new Response(Deno.stdin.readable).bytes();
  if (greeting.length === 0) throw new Error("it is empty");
  return greeting;
}

/** Stops the server on the first signal; a second one has its default effect. */
function stopOnSignals(server: GreetingServer) {
  const other = Deno.build.os === "windows" ? "SIGBREAK" : "SIGTERM";
  let stopping = false;
  function stop() {
    if (stopping) return;
    stopping = true;
    server.shutdown();
    const open = server.connections;
    if (open > 0) {
      say(
        `Stopping: waiting for clients (${open} left); a second signal ends it`,
      );
    }
    // Not sooner: under `deno task` one Ctrl-C arrives twice.
    setTimeout(() => {
      Deno.removeSignalListener("SIGINT", stop);
      Deno.removeSignalListener(other, stop);
    }, 500);
  }
  Deno.addSignalListener("SIGINT", stop);
  Deno.addSignalListener(other, stop);
}

/** Greets until a signal comes. */
async function run(
  { verbose, ...options }: ServeOptions & { verbose: boolean },
) {
  const count = { greeted: 0, failed: 0 };
  let complained = -Infinity;
  const server = serve({
    ...options,
    onOutcome(outcome) {
      count[outcome.error ? "failed" : "greeted"]++;
      if (verbose) say(lineFor(outcome));
    },
    onAcceptError(error) {
      if (performance.now() - complained < 1000) return;
      complained = performance.now();
      say(`Cannot accept, trying again: ${error.message}`);
    },
  });
  stopOnSignals(server);
  say(`Listening on ${hostPort(server.addr)} (try: ${clientFor(server.addr)})`);
  await server.finished;
  say(`Stopped: ${count.greeted} greeted, ${count.failed} failed`);
}

/** Returns the exit code. */
async function main(args: string[]): Promise<number> {
  let task = "";
  try {
    const { help, version, ...flags } = await parseFlags(args);
    if (help || version) {
      task = "write to standard output";
      await write(Deno.stdout, help ? HELP : `@greeting/server ${VERSION}\n`);
      return 0;
    }
    task = "read standard input";
    const greeting = flags.greeting === "-"
      ? await readGreeting()
      : flags.greeting;
    task = `listen on ${hostPort(flags)}`;
    await run({ ...flags, greeting });
    return 0;
  } catch (error) {
    const { message } = error as Error;
    say(task ? `Cannot ${task}: ${message}` : `${message} (see --help)`);
    return task ? 1 : 2;
  }
}

if (import.meta.main) {
  const exitCode = await main(Deno.args);
  await Promise.race([logging, sleep(500)]); // its reader may have stalled
  Deno.exit(exitCode);
}
