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
 * @module
 */

import { parseArgs } from "@std/cli/parse-args";
import config from "./deno.json" with { type: "json" };

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
  hostname?: string;
  /** TCP port, 0 for any free one. Default: 9000. */
  port?: number;
  /**
   * What clients are sent, or a function of the client's address that returns
   * it or a promise of it. Where that throws, rejects or does not answer in
   * time, that one connection fails. Default: `Hello from server\n`.
   */
  greeting?: Greeting | GreetingFunction;
  /**
   * Connections that the kernel queues for accept(). It cuts this down to its
   * own maximum, on Linux `net.core.somaxconn`. Default: 65535.
   */
  backlog?: number;
  /**
   * How long a client may take for its greeting and then, once more, to close
   * its side, in milliseconds. A greeted client has no more than a second while
   * there is no room for others, or the server is stopping. Default: 5000.
   */
  timeout?: number;
  /** Connections held at once; more wait in the queue. Default: 10000. */
  maxConnections?: number;
  /**
   * Share the port with other processes (SO_REUSEPORT, on Linux). Deno wants
   * `"unstable": ["net"]` in its configuration for this. Default: false.
   */
  reusePort?: boolean;
  /** Aborting it stops the server and closes every connection at once. */
  signal?: AbortSignal;
  /** Called when the server listens. What it throws, `serve` throws. */
  onListen?: (localAddr: Deno.NetAddr) => void;
  /**
   * Called once for every client, at the moment it has been greeted or could not
   * be. See `finished` if it throws.
   */
  onOutcome?: (outcome: Outcome) => void;
  /** Called when accept() fails, for want of descriptors, say. It is retried. */
  onAcceptError?: (error: Error) => void;
}

/** What {@linkcode serve} takes for an option that is left out. */
export const DEFAULTS: Required<
  Omit<ServeOptions, "signal" | `on${string}`>
> = {
  hostname: "0.0.0.0",
  port: 9000,
  greeting: "Hello from server\n",
  backlog: 65535,
  timeout: 5000,
  maxConnections: 10000,
  reusePort: false,
};

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
  error?: Error;
}

/** A running server. */
export interface GreetingServer extends AsyncDisposable {
  /** The address it listens on, with the real port. */
  readonly addr: Deno.NetAddr;
  /** How many connections are open. */
  readonly connections: number;
  /**
   * Resolves when it no longer listens and every connection has ended, or then
   * rejects with the first error that a callback threw: that stops no server.
   */
  readonly finished: Promise<void>;
  /**
   * Greets the clients that the kernel has already connected (or, where more
   * keep coming, accepts for the timeout), stops listening, lets open
   * connections end and returns `finished`.
   */
  shutdown(): Promise<void>;
}

// ================================ The server ================================
// A connection is in one of two states. It waits for its greeting and then, half
// closed, it lingers until the client closes too; in each for the timeout at
// most. Whoever has been greeted must not keep others waiting: in a hurry, which
// is while there is no room for the next client or the server is to stop, a
// connection lingers for a second at most.

/**
 * The longest that a connection lingers in a hurry, in milliseconds. Not less: a
 * client's data may still be on its way, and meets a closed socket with a reset.
 * With 5 % of packets lost, closing at once cost 3 clients in 1000 the greeting.
 */
const HURRIED_LINGER = 1000;

/**
 * Accepting pauses at this many first writes in flight: the runtime polls only
 * so many operations a turn, and of thousands some would wait for seconds (p99
 * of 4,000 clients at once: 1.5 s, with the pause 0.2 s). First writes alone
 * count, as they go into empty buffers: none of them waits for its client.
 */
const MAX_FIRST_WRITES = 64;

/** Where all that clients send is thrown. One is enough: nobody looks. */
const SINK = new Uint8Array(262144);

/**
 * Listens on TCP and greets every client until told to stop. Prints nothing.
 * Whatever a client does, the others are greeted.
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
  const { hostname, port, backlog, reusePort } = settings;
  settings.signal?.throwIfAborted();
  // Steps 1 to 4 are one call: socket(), the address, bind() and listen().
  const listener = Deno.listen({
    hostname,
    port,
    tcpBacklog: backlog,
    reusePort,
  });
  try {
    settings.onListen?.(listener.addr as Deno.NetAddr);
  } catch (error) {
    listener.close();
    throw error;
  }
  return new Server(listener, settings);
}

/** A connection, linked to its neighbours in the {@linkcode Ring} of its state. */
class Connection {
  /** When it entered its state, on the clock of `performance.now()`. */
  since = 0;
  /** Bytes of the greeting that the kernel has taken. */
  bytes = 0;
  /** Resolves when nothing more comes from the client. */
  drained?: Promise<void>;
  /** Why the server closed it early, if it did. */
  cutReason: unknown;
  /** Ends the wait for a greeting function's promise. */
  onCut?: (reason: unknown) => void;
  older: Connection = this;
  newer: Connection = this;

  constructor(readonly conn: Deno.TcpConn) {}

  /** Closes it early; what it waits for rejects. */
  cut(reason: unknown) {
    this.leave();
    this.cutReason = reason;
    this.onCut?.(reason);
    this.conn[Symbol.dispose]();
  }

  leave() {
    this.older.newer = this.newer;
    this.newer.older = this.older;
    this.older = this.newer = this; // keeps no other alive
  }
}

/** The state of a running server, then its functions, step by step. */
class Server implements GreetingServer {
  readonly addr: Deno.NetAddr;
  readonly finished: Promise<void>;

  readonly #listener: Deno.TcpListener;
  readonly #settings: Settings;
  /** What a client that took too long failed with. */
  readonly #late: Error;

  /** Connections accepted and not yet closed. */
  #connections = 0;
  /** Those of them that wait for their greeting. */
  readonly #waiting = new Ring();
  /** Those that have been greeted and linger. */
  readonly #lingering = new Ring();
  /** One for all deadlines. A timer for each would cost 13 % more CPU. */
  #timer?: ReturnType<typeof setTimeout>;
  /** When it goes off: `Infinity` where none is set. */
  #timerDue = Infinity;

  /** How often accept() has answered, with a connection or an error. */
  #answers = 0;
  /** First writes in flight. */
  #firstWrites = 0;
  /** The pause before accept() is tried again, 0 unless it failed last time. */
  #acceptPause = 0;
  /** Whether the accept loop waits for room, or for that pause to end. */
  #paused = false;
  /** Ends that waiting; after the accept loop, the one for the last connection. */
  #wake = () => {};

  /** A stop was asked for. */
  #stopping = false;
  /** Greets who is still in the queue, and closes the listener. */
  #lastCall?: Promise<void>;
  /** The first error that a callback threw. */
  #thrown?: { error: unknown };

  constructor(listener: Deno.TcpListener, settings: Settings) {
    this.addr = listener.addr as Deno.NetAddr;
    this.#listener = listener;
    this.#settings = settings;
    const { signal, timeout } = settings;
    this.#late = new Deno.errors.TimedOut(`not taken in ${timeout} ms`);
    this.finished = this.#run();
    signal?.addEventListener("abort", this.#abort);
    if (signal?.aborted) this.#abort(); // by onListen
  }

  get connections(): number {
    return this.#connections;
  }

  /** From the first accept() to the end of the last connection. */
  async #run() {
    await this.#accept();
    while (this.#connections > 0) await this.#pause();
    await this.#lastCall;
    clearTimeout(this.#timer);
    this.#settings.signal?.removeEventListener("abort", this.#abort);
    if (this.#thrown) throw this.#thrown.error;
  }

  /** Step 5: accept, until the listener is closed. */
  async #accept() {
    while (true) {
      try {
        for await (const conn of this.#listener) {
          this.#answers++;
          this.#acceptPause = 0;
          this.#greet(conn); // not awaited: clients are served side by side
          while (this.#isFull() || this.#firstWrites >= MAX_FIRST_WRITES) {
            await this.#pause();
          }
        }
        return;
      } catch (error) {
        this.#answers++;
        // The client reset its connection before it was accepted.
        if (error instanceof Deno.errors.NotConnected) continue;
        if (error instanceof Deno.errors.ConnectionAborted) continue;
        // No descriptor or memory is left, say (a bare loop ends here). The
        // listener is as good as before, and the client waits in its queue.
        this.#notify(error as Error, this.#settings.onAcceptError);
        await this.#pauseAfterFailure();
      }
    }
  }

  /** Whether every place for a connection is taken. */
  #isFull(): boolean {
    return this.#connections >= this.#settings.maxConnections;
  }

  /** Waits for a change. */
  async #pause() {
    this.#paused = true;
    await new Promise<void>((resolve) => this.#wake = resolve);
    this.#paused = false;
  }

  /** From 5 ms to a second, as in Go's net/http; a connection's end ends it. */
  async #pauseAfterFailure() {
    this.#acceptPause = Math.min(this.#acceptPause * 2 || 5, 1000);
    this.#cutOverdue(); // a hurry has begun
    const retry = setTimeout(() => this.#wake(), this.#acceptPause);
    await this.#pause();
    clearTimeout(retry);
  }

  /** Steps 6 and 7: the life of a connection. */
  async #greet(conn: Deno.TcpConn) {
    const connection = this.#admit(conn);
    let greeted = false;
    try {
      this.#settings.signal?.throwIfAborted();
      await this.#write(connection);
      greeted = true;
      this.#report(connection);
      this.#lingering.add(connection);
      // Half-close, so that the client sees the end; close when it has closed
      // too. To close with data unread sends RST, and that can destroy what the
      // client has yet to read (RFC 9112, section 9.6, tells the same of HTTP).
      await conn.closeWrite();
      await connection.drained;
    } catch (reason) {
      const error = toError(connection.cutReason ?? reason);
      if (!greeted) this.#report(connection, error);
    }
    conn[Symbol.dispose](); // close(), but no error if it was cut
    await connection.drained; // over now, if it was not before
    connection.leave();
    this.#connections--;
    this.#wake();
  }

  /** From now on it waits for its greeting. */
  #admit(conn: Deno.TcpConn): Connection {
    const connection = new Connection(conn);
    this.#waiting.add(connection);
    this.#connections++;
    // The first one needs the timer; the last there is room for begins a hurry.
    if (this.#isFull() || this.#timerDue === Infinity) this.#cutOverdue();
    return connection;
  }

  /** Step 6: write. A write may be short, so it is finished. */
  async #write(connection: Connection) {
    const { conn } = connection;
    const { greeting } = this.#settings;
    const message = greeting instanceof Uint8Array
      ? greeting
      : await this.#ask(connection);
    this.#firstWrites++;
    try {
      connection.bytes = await conn.write(message);
    } finally {
      if (this.#firstWrites-- === MAX_FIRST_WRITES) this.#wake();
    }
    // Reading starts before all is written: a client that sends more than the
    // buffers hold reads nothing until it is through.
    connection.drained = drain(conn);
    while (connection.bytes < message.length) {
      connection.bytes += await conn.write(message.subarray(connection.bytes));
    }
  }

  /** Calls the greeting function. Being cut off ends the wait for its promise. */
  async #ask(connection: Connection): Promise<Uint8Array> {
    const greeting = this.#settings.greeting as GreetingFunction;
    const answer = greeting(connection.conn.remoteAddr);
    const cut = new Promise<never>((_, reject) => connection.onCut = reject);
    return toBytes(await Promise.race([answer, cut]));
  }

  #report(connection: Connection, error?: Error) {
    const { conn: { remoteAddr }, bytes, since } = connection;
    const milliseconds = performance.now() - since;
    const outcome = { remoteAddr, bytes, milliseconds, error };
    this.#notify(outcome, this.#settings.onOutcome);
  }

  /** Cuts who has had the time of its state, and sets the timer for the next. */
  #cutOverdue() {
    const { timeout } = this.#settings;
    const inAHurry = this.#stopping || this.#acceptPause > 0 || this.#isFull();
    const linger = inAHurry ? Math.min(timeout, HURRIED_LINGER) : timeout;
    const now = performance.now();
    this.#waiting.cut(now - timeout, this.#late);
    this.#lingering.cut(now - linger);
    if (this.#connections === 0) return;
    // If a state has nobody in it yet, somebody may enter it from now on.
    const due = Math.min(
      (this.#waiting.oldest?.since ?? now) + timeout,
      (this.#lingering.oldest?.since ?? now) + linger,
    );
    if (due >= this.#timerDue) return;
    clearTimeout(this.#timer);
    this.#timerDue = due;
    this.#timer = setTimeout(() => {
      this.#timerDue = Infinity;
      this.#cutOverdue();
    }, Math.ceil(due - now));
  }

  /** Step 8: shut the server down. A field, so that it can be handed on alone. */
  readonly shutdown = (): Promise<void> => {
    if (!this.#stopping) {
      this.#stopping = true;
      this.#cutOverdue();
      this.#lastCall = this.#closeListener();
    }
    return this.finished;
  };

  /**
   * Whoever is in the queue is connected and gets the greeting. So accepting goes
   * on until a turn of the event loop brings nobody new; within bounds, so that a
   * flood cannot hold it up.
   */
  async #closeListener() {
    const { backlog, timeout } = this.#settings;
    const end = performance.now() + timeout;
    const last = this.#answers + backlog;
    let before: number | undefined;
    do {
      // Who does not accept learns nothing from a turn.
      before = this.#paused ? undefined : this.#answers;
      await nextTimers(); // may come before the I/O of the same turn
      await nextTimers();
    } while (
      before !== this.#answers && this.#answers < last &&
      performance.now() < end
    );
    this.#listener[Symbol.dispose](); // close(), but no error if aborted
  }

  /** Shuts down at once. */
  readonly #abort = () => {
    this.#stopping = true;
    const reason = this.#settings.signal?.reason;
    this.#waiting.cut(Infinity, reason);
    this.#lingering.cut(Infinity, reason);
    this.#listener[Symbol.dispose]();
    this.#wake(); // from a pause after a failure
  };

  readonly [Symbol.asyncDispose] = this.shutdown;

  async #notify<T>(value: T, callback?: (value: T) => void) {
    try {
      await callback?.(value); // it may well be an async function
    } catch (error) {
      this.#thrown ??= { error };
    }
  }
}

/**
 * Reads and throws away all that comes, until the client closes or is gone. With
 * a pause after every read: four clients that flood the server would keep others
 * waiting for 240 ms at p99, and with it for 12 ms.
 */
async function drain(conn: Deno.TcpConn): Promise<void> {
  try {
    while (await conn.read(SINK) !== null) await nextTimers();
  } catch {
    // Reset by the client, or cut: nothing more will come.
  }
}

// ================================ A back room ================================
// What the story above takes for granted.

/**
 * Connections in the order in which they entered it. A Set would be shorter, but
 * its outgrown tables keep dead connections alive through young garbage
 * collections, whose pauses grow from 0.4 to 3.5 ms: with 64 clients at once, 5 %
 * more CPU for each and a third more wait at p99.
 */
class Ring {
  /** No connection: it stands between the newest and the oldest. */
  readonly #end = new Connection(undefined as never);

  get oldest(): Connection | undefined {
    const oldest = this.#end.newer;
    return oldest === this.#end ? undefined : oldest;
  }

  /** Adds the newest, and takes it out of the ring where it was. */
  add(connection: Connection) {
    connection.leave();
    connection.since = performance.now();
    connection.older = this.#end.older;
    connection.newer = this.#end;
    connection.older.newer = connection.newer.older = connection;
  }

  /** Closes what has been here since a time or longer. */
  cut(since: number, reason?: unknown) {
    for (let c = this.oldest; c && c.since <= since; c = this.oldest) {
      c.cut(reason);
    }
  }
}

/** Resolves when the event loop comes to its timers. */
function nextTimers(): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve));
}

function toError(reason: unknown): Error {
  if (reason instanceof Error) return reason;
  return new Error("not an Error was thrown", { cause: reason });
}

function toBytes(greeting: Greeting): Uint8Array {
  if (typeof greeting === "string") return new TextEncoder().encode(greeting);
  check("greeting", greeting instanceof Uint8Array, "a string or a Uint8Array");
  return greeting;
}

function check(option: string, ok: boolean, rule: string, Kind = TypeError) {
  if (!ok) throw new Kind(`${option} must be ${rule}`);
}

/** The most that listen(2) and a timer take. */
const MAX_INT32 = 2 ** 31 - 1;

/** From where to where each option that is a whole number goes. */
const RANGES = {
  port: [0, 65535],
  backlog: [1, MAX_INT32],
  timeout: [1, MAX_INT32],
  maxConnections: [1, MAX_INT32],
} as const;

/** Options that were checked, none without its value. */
type Settings = ServeOptions & typeof DEFAULTS;

function checkOptions(options: ServeOptions): Settings {
  const given = Object.entries(options).filter(([, v]) => v !== undefined);
  const all: Settings = { ...DEFAULTS, ...Object.fromEntries(given) };
  check("hostname", typeof all.hostname === "string", "a string");
  for (const [option, [min, max]] of Object.entries(RANGES)) {
    const value = all[option as keyof typeof RANGES];
    check(option, typeof value === "number", "a number");
    const ok = Number.isInteger(value) && value >= min && value <= max;
    check(option, ok, `a whole number from ${min} to ${max}`, RangeError);
  }
  check("reusePort", typeof all.reusePort === "boolean", "a boolean");
  const { signal, onListen, onOutcome, onAcceptError } = all;
  check("signal", !signal || signal instanceof AbortSignal, "an AbortSignal");
  const callbacks = { onListen, onOutcome, onAcceptError };
  for (const [option, value] of Object.entries(callbacks)) {
    check(option, !value || typeof value === "function", "a function");
  }
  const { greeting } = all;
  // A fixed greeting is encoded once, not for every client.
  return typeof greeting === "function"
    ? all
    : { ...all, greeting: toBytes(greeting) };
}

// ============================= The command line =============================

const HELP = `Writes a greeting to every TCP client and closes the connection.

Usage: deno run --allow-net server.ts [options]

  -p, --port <port>          TCP port, 0 for any free one (9000)
  -H, --hostname <host>      address to listen on (0.0.0.0);
                             :: is IPv6 and IPv4 together
  -g, --greeting <text>      what every client is sent (Hello from server), a
                             newline added where it has none; --greeting=- is
                             standard input, byte for byte
  -b, --backlog <n>          connections the kernel queues for accept() (65535,
                             which it cuts down to its own maximum)
  -t, --timeout <seconds>    how long a client may take for its greeting, and
                             then once more to close, such as 0.5 (5)
  -c, --max-connections <n>  connections held at once; more wait (10000)
  -r, --reuse-port           share the port with other processes (Linux)
  -v, --verbose              print a line for every connection
  -h, --help                 print this
  -V, --version              print the version`;

/** A bad command line; its message is one line. */
export class UsageError extends Error {}

/** What a command line asks for. */
export type Flags =
  & ServeOptions
  & Record<"verbose" | "help" | "version", boolean>;

/**
 * Parses a command line. A greeting of `-` stands for standard input.
 *
 * @throws {UsageError} For an unknown flag, a stray word, a bad or missing value.
 */
export function parseFlags(args: string[]): Flags {
  // parseArgs() would take -gno=yes for -g yes.
  const unknown = args.filter((arg) => /^-[^-=][^=]+=/.test(arg));
  const flags: Values = parseArgs(args, {
    alias: {
      p: "port",
      H: "hostname",
      g: "greeting",
      b: "backlog",
      t: "timeout",
      c: "max-connections",
      r: "reuse-port",
      v: "verbose",
      h: "help",
      V: "version",
    },
    // No switch is declared as boolean: --verbose=no would be true.
    string: ["p", "H", "g", "b", "t", "c"],
    unknown: (arg: string) => {
      unknown.push(arg);
      return false;
    },
  });
  unknown.push(...flags._ as string[]); // what follows --

  const range = [0.001, Math.floor(MAX_INT32 / 1000)] as const;
  const seconds = number(flags, "timeout", range, false);
  const greeting = text(flags, "greeting");
  const isLine = !greeting || greeting === "-" || greeting.endsWith("\n");
  const parsed = {
    hostname: text(flags, "hostname"),
    port: number(flags, "port", RANGES.port),
    greeting: isLine ? greeting : greeting + "\n",
    backlog: number(flags, "backlog", RANGES.backlog),
    timeout: seconds && Math.round(seconds * 1000),
    maxConnections: number(flags, "max-connections", RANGES.maxConnections),
    reusePort: isOn(flags, "reuse-port"),
    verbose: isOn(flags, "verbose"),
    help: isOn(flags, "help"),
    version: isOn(flags, "version"),
  };
  const [arg] = unknown;
  if (arg === undefined) return parsed;
  fail(
    `${/^-./.test(arg) ? "unknown flag" : "stray word"} ${JSON.stringify(arg)}`,
  );
}

/** What parseArgs() found. */
type Values = Record<string, unknown>;

function fail(problem: string): never {
  throw new UsageError(`${problem} (see --help)`);
}

function isOn(values: Values, flag: string): boolean {
  const value = values[flag] ?? false;
  if (typeof value === "boolean") return value;
  fail(`--${flag} takes no value, and was given ${JSON.stringify(value)}`);
}

function text(values: Values, flag: string): string | undefined {
  if (values[flag] === "") fail(`--${flag} needs a value: --${flag}=...`);
  return values[flag] as string | undefined;
}

function number(
  values: Values,
  flag: string,
  [min, max]: readonly [number, number],
  whole = true,
): number | undefined {
  const value = text(values, flag);
  if (value === undefined) return undefined;
  const form = whole ? /^\d+$/ : /^\d*\.?\d+$/;
  if (form.test(value) && +value >= min && +value <= max) return +value;
  const rule = `a ${whole ? "whole " : ""}number from ${min} to ${max}`;
  fail(`--${flag} must be ${rule}, not ${JSON.stringify(value)}`);
}

const ADVICE = [
  [Deno.errors.AddrInUse, "the port is in use; choose another with --port"],
  [Deno.errors.AddrNotAvailable, "not this machine's address; see --hostname"],
  [Deno.errors.PermissionDenied, "a privileged port; use --port above 1023"],
  [Deno.errors.NotCapable, "no network permission; run with --allow-net"],
] as const;

/** What went wrong and, where it is known, what to do: on one line. */
function reasonOf(error: unknown): string {
  const advice = ADVICE.find(([Kind]) => error instanceof Kind)?.[1];
  return advice ?? (error as Error).message
    .replace(/^failed to lookup.*/, "the name does not resolve; see --hostname")
    .replace(/\s+/g, " ");
}

/** `host:port`, on one line whatever is in it; IPv6 addresses in brackets. */
function hostPort(addr: { hostname: string; port: number }): string {
  const host = JSON.stringify(addr.hostname).slice(1, -1);
  return `${host.includes(":") ? `[${host}]` : host}:${addr.port}`;
}

/**
 * Whether a version of Deno can end a pending write by close(): from 2.9.5 on
 * (denoland/deno#36369). Before, a client that reads nothing is held for ever.
 */
export function canCutOff(denoVersion: string): boolean {
  return denoVersion.localeCompare("2.9.5", "en", { numeric: true }) >= 0;
}

/** Prints a line to standard error. A full disk there stops no server. */
function say(line: string): void {
  try {
    console.error(line);
  } catch {
    // There is nowhere left to say so.
  }
}

/** The command of a client. */
function clientFor({ hostname, port }: Deno.NetAddr): string {
  const local = ["0.0.0.0", "::"].includes(hostname);
  return `nc ${local ? "localhost" : hostname} ${port}`;
}

function lineFor({ remoteAddr, bytes, milliseconds, error }: Outcome): string {
  const how = error ? `failed, ${error.message}` : "greeted";
  const figures = `${bytes} bytes, ${milliseconds.toFixed(1)} ms`;
  return `${hostPort(remoteAddr)} ${how}: ${figures}`;
}

let lastComplaint = -Infinity;

/** Says why accept() fails, once a second at the most. */
function complain(error: Error): void {
  if (performance.now() - lastComplaint < 1000) return;
  lastComplaint = performance.now();
  say(`Cannot accept, trying again: ${error.message}`);
}

/** The signals to stop on, and the exit code when one comes a second time. */
const STOP_SIGNALS: [Deno.Signal, number][] = Deno.build.os === "windows"
  ? [["SIGINT", 130], ["SIGBREAK", 149]]
  : [["SIGINT", 130], ["SIGTERM", 143]];

/** Stops the server on the first signal, at once on the second: its exit code. */
async function stopOnSignals(server: GreetingServer, atOnce: AbortController) {
  let stopping = false;
  let exitCode = 0;
  for (const [signal, code] of STOP_SIGNALS) {
    Deno.addSignalListener(signal, () => {
      if (stopping) {
        exitCode = code;
        // In any case, even where close() cannot end a pending write.
        setTimeout(() => Deno.exit(code), 1000);
        return atOnce.abort(new Error("stopped at once"));
      }
      stopping = true;
      server.shutdown();
      const open = server.connections;
      if (open === 0) return;
      say(
        `Stopping: waiting for clients (${open} left); a second signal stops at once`,
      );
    });
  }
  await server.finished;
  return exitCode;
}

async function main(args: string[]): Promise<number> {
  let flags: Flags;
  try {
    flags = parseFlags(args);
  } catch (error) {
    if (!(error instanceof UsageError)) throw error;
    say(error.message);
    return 2;
  }
  if (flags.help || flags.version) {
    console.log(flags.help ? HELP : `${config.name} ${config.version}`);
    return 0;
  }

  const { hostname = DEFAULTS.hostname, port = DEFAULTS.port, verbose } = flags;
  const atOnce = new AbortController();
  const count = { greeted: 0, failed: 0 };
  let server: GreetingServer;
  let task = "read standard input";
  try {
    if (flags.greeting === "-") {
      flags.greeting = await new Response(Deno.stdin.readable).bytes();
    }
    task = `listen on ${hostPort({ hostname, port })}`;
    server = serve({
      ...flags,
      signal: atOnce.signal,
      onOutcome(outcome) {
        count[outcome.error ? "failed" : "greeted"]++;
        if (verbose) say(lineFor(outcome));
      },
      onAcceptError: complain,
    });
  } catch (error) {
    say(`Cannot ${task}: ${reasonOf(error)}`);
    return 1;
  }
  const stopped = stopOnSignals(server, atOnce);
  say(`Listening on ${hostPort(server.addr)} (try: ${clientFor(server.addr)})`);
  if (!canCutOff(Deno.version.deno)) {
    say(
      `Deno ${Deno.version.deno} holds a client that reads nothing for ever; 2.9.5 and later cut it off at the timeout`,
    );
  }
  const exitCode = await stopped;
  say(`Stopped: ${count.greeted} greeted, ${count.failed} failed`);
  return exitCode;
}

if (import.meta.main) Deno.exit(await main(Deno.args));
