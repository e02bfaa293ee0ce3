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

/** Options of {@linkcode serve}. */
export interface ServeOptions {
  /** Address to listen on; `::` is IPv6 and IPv4. Default: `0.0.0.0`. */
  hostname?: string;
  /** TCP port, 0 for any free one. Default: 9000. */
  port?: number;
  /**
   * What clients are sent, or a function of the client's address that returns
   * it; if it throws, that one connection fails. Default: `Hello from server\n`.
   */
  greeting?: Greeting | ((client: Deno.NetAddr) => Greeting);
  /** Connections that the kernel queues for accept(). Default: 4096. */
  backlog?: number;
  /** How long one connection may live, in milliseconds. Default: 5000. */
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
  /** Called when a connection has ended. See `finished` if it throws. */
  onConnectionEnd?: (end: ConnectionEnd) => void;
  /** Called when accept() fails, for want of descriptors, say. It is retried. */
  onAcceptError?: (error: Error) => void;
}

/** How a connection went. */
export interface ConnectionEnd {
  /** The client's address. */
  remoteAddr: Deno.NetAddr;
  /** Bytes of the greeting that the kernel took. */
  bytes: number;
  /** How long the connection lived, in milliseconds. */
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
  /** Stops listening, lets open connections end and returns `finished`. */
  shutdown(): Promise<void>;
}

/** The most that listen(2) and a timer take. */
const MAX_INT32 = 2 ** 31 - 1;

function check(option: string, ok: boolean, rule: string, Kind = TypeError) {
  if (!ok) throw new Kind(`${option} must be ${rule}`);
}

function checkWhole(option: string, value: number, min: number, max: number) {
  check(option, typeof value === "number", "a number");
  const ok = Number.isInteger(value) && value >= min && value <= max;
  check(option, ok, `a whole number from ${min} to ${max}`, RangeError);
}

function toBytes(greeting: Greeting): Uint8Array {
  if (typeof greeting === "string") return new TextEncoder().encode(greeting);
  check("greeting", greeting instanceof Uint8Array, "a string or a Uint8Array");
  return greeting;
}

// ================================ The server ================================

/**
 * Accepting pauses at this many first writes in flight: the runtime polls only
 * so many operations a turn, and of thousands some would wait for seconds (p99
 * of 4,000 clients at once: 1.5 s, with the pause 0.2 s). First writes alone
 * count, as they go into empty buffers: none of them waits for its client.
 */
const MAX_FIRST_WRITES = 64;

/** Pause after a failed accept(), in milliseconds. */
const ACCEPT_PAUSE = 100;

/** Where all that clients send is thrown. One is enough: nobody looks. */
const SINK = new Uint8Array(262144);

/**
 * An open connection and its neighbours in a ring of them all, in the order they
 * came. A Set would be shorter, but its outgrown tables keep dead connections
 * alive through young garbage collections, whose pauses grow from 0.4 to 3.5 ms:
 * with 64 clients at once, 5 % more CPU for each and a third more wait at p99.
 */
interface Connection {
  conn: Deno.TcpConn;
  since: number;
  /** Why the server closed it early, if it did. */
  cutReason: unknown;
  older: Connection;
  newer: Connection;
}

/**
 * Listens on TCP and greets every client until told to stop. Prints nothing.
 * No client can stop it, or keep another one waiting.
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
  const { hostname = "0.0.0.0", port = 9000, reusePort = false } = options;
  const { greeting = "Hello from server\n", signal } = options;
  const { backlog = 4096, timeout = 5000, maxConnections = 10000 } = options;
  const { onListen, onConnectionEnd, onAcceptError } = options;

  check("hostname", typeof hostname === "string", "a string");
  checkWhole("port", port, 0, 65535);
  checkWhole("backlog", backlog, 1, MAX_INT32);
  checkWhole("timeout", timeout, 1, MAX_INT32);
  checkWhole("maxConnections", maxConnections, 1, MAX_INT32);
  check("reusePort", typeof reusePort === "boolean", "a boolean");
  check("signal", !signal || signal instanceof AbortSignal, "an AbortSignal");
  const callbacks = { onListen, onConnectionEnd, onAcceptError };
  for (const [option, value] of Object.entries(callbacks)) {
    check(option, !value || typeof value === "function", "a function");
  }
  // A fixed greeting is encoded once, not for every client.
  const fixed = typeof greeting === "function" ? "" : toBytes(greeting);
  const greetingFor = typeof greeting === "function" ? greeting : () => fixed;
  signal?.throwIfAborted();

  // Steps 1 to 4 are one call: socket(), the address, bind() and listen().
  const listener = Deno.listen({
    hostname,
    port,
    tcpBacklog: backlog,
    reusePort,
  });
  const addr = listener.addr as Deno.NetAddr;
  try {
    onListen?.(addr);
  } catch (error) {
    listener.close();
    throw error;
  }

  const ring = {} as Connection; // stands between the newest and the oldest
  ring.older = ring.newer = ring;
  let connections = 0;
  let firstWrites = 0;
  let deadlineTimer: ReturnType<typeof setTimeout> | undefined;
  let thrown: { error: unknown } | undefined;

  // Accepting waits for room, and after it the end for the last connection: each
  // end of a first write or of a connection wakes whichever it is.
  let wake = () => {};
  const change = () => new Promise<void>((resolve) => wake = resolve);

  const isFull = () =>
    firstWrites >= MAX_FIRST_WRITES || connections >= maxConnections;

  // Step 5: accept, until the listener is closed.
  async function accept() {
    while (true) {
      try {
        for await (const conn of listener) {
          greet(conn); // not awaited: clients are served side by side
          while (isFull()) await change();
        }
        return;
      } catch (error) {
        // The client reset its connection before it was accepted.
        if (error instanceof Deno.errors.NotConnected) continue;
        if (error instanceof Deno.errors.ConnectionAborted) continue;
        // No descriptor or memory is left. The listener is as good as before,
        // and the client waits in its queue.
        notify(error as Error, onAcceptError);
        const retry = setTimeout(() => wake(), ACCEPT_PAUSE);
        await change();
        clearTimeout(retry);
      }
    }
  }

  // Steps 6 and 7: write, read and close.
  async function greet(conn: Deno.TcpConn) {
    const since = performance.now();
    const connection: Connection = {
      conn,
      since,
      cutReason: undefined,
      older: ring.older,
      newer: ring,
    };
    ring.older.newer = connection;
    ring.older = connection;
    connections++;
    deadlineTimer ??= setTimeout(cutOverdue, timeout);
    if (signal?.aborted) cut(connection, signal.reason);

    let bytes = 0;
    let greeted = false;
    let drained: Promise<void> | undefined;
    let error: Error | undefined;
    try {
      const message = toBytes(greetingFor(conn.remoteAddr));
      firstWrites++;
      bytes = await conn.write(message).finally(firstWritten);
      // Reading starts before all is written: a client that sends more than
      // the buffers hold reads nothing until it is through.
      drained = drain(conn);
      while (bytes < message.length) {
        bytes += await conn.write(message.subarray(bytes));
      }
      greeted = true;
      // Half-close, so that the client sees the end; close when it has closed
      // too. To close with data unread sends RST, and that can destroy what the
      // client has yet to read (RFC 9112, section 9.6, tells the same of HTTP).
      await conn.closeWrite();
      await drained;
    } catch (reason) {
      if (!greeted) error = toError(connection.cutReason ?? reason);
    } finally {
      conn[Symbol.dispose](); // close(), but without an error if cut() was first
      await drained; // over now, if it was not before
      connection.older.newer = connection.newer;
      connection.newer.older = connection.older;
      connection.older = connection.newer = connection; // keeps none alive
      connections--;
      wake();
      const { remoteAddr } = conn;
      const milliseconds = performance.now() - since;
      notify({ remoteAddr, bytes, milliseconds, error }, onConnectionEnd);
    }
  }

  function firstWritten() {
    firstWrites--;
    wake();
  }

  // The deadline. One timer is enough: the oldest connection is the first due.
  function cutOverdue() {
    const now = performance.now();
    const late = new Deno.errors.TimedOut(`not taken in ${timeout} ms`);
    let oldest = ring.newer;
    while (oldest !== ring && oldest.since + timeout <= now) {
      cut(oldest, late);
      oldest = oldest.newer;
    }
    deadlineTimer = oldest === ring
      ? undefined
      : setTimeout(cutOverdue, Math.ceil(oldest.since + timeout - now));
  }

  async function notify<T>(value: T, callback?: (value: T) => void) {
    try {
      await callback?.(value); // it may well be an async function
    } catch (error) {
      thrown ??= { error };
    }
  }

  // Step 8: shut the server down.
  function shutdown() {
    listener[Symbol.dispose](); // close(), but without an error the second time
    return finished;
  }

  function abort() {
    for (let c = ring.newer; c !== ring; c = c.newer) cut(c, signal?.reason);
    shutdown();
  }

  async function run() {
    await accept();
    while (connections > 0) await change();
    clearTimeout(deadlineTimer);
    signal?.removeEventListener("abort", abort);
    if (thrown) throw thrown.error;
  }

  const finished = run();
  signal?.addEventListener("abort", abort);
  if (signal?.aborted) abort(); // by onListen
  return {
    addr,
    get connections() {
      return connections;
    },
    finished,
    shutdown,
    [Symbol.asyncDispose]: shutdown,
  };
}

/**
 * Reads and throws away all that comes, until the client closes or is gone. With
 * a pause after every read: four clients that flood the server would keep others
 * waiting for 240 ms at p99, and with it for 12 ms.
 */
async function drain(conn: Deno.TcpConn): Promise<void> {
  try {
    while (await conn.read(SINK) !== null) {
      await new Promise((resolve) => setTimeout(resolve));
    }
  } catch {
    // Reset by the client, or cut: nothing more will come.
  }
}

/** Closes a connection early; what it waits for rejects. */
function cut(connection: Connection, reason: unknown): void {
  connection.cutReason = reason;
  connection.conn[Symbol.dispose]();
}

function toError(reason: unknown): Error {
  if (reason instanceof Error) return reason;
  return new Error("not an Error was thrown", { cause: reason });
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
  -b, --backlog <n>          connections the kernel queues for accept() (4096)
  -t, --timeout <seconds>    how long one connection may live, such as 0.5 (5)
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
  const flags: Record<string, unknown> = parseArgs(args, {
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

  function fail(problem: string): never {
    throw new UsageError(`${problem} (see --help)`);
  }
  function isOn(flag: string): boolean {
    const value = flags[flag] ?? false;
    if (typeof value === "boolean") return value;
    fail(`--${flag} takes no value, and was given ${JSON.stringify(value)}`);
  }
  function text(flag: string): string | undefined {
    if (flags[flag] === "") fail(`--${flag} needs a value: --${flag}=...`);
    return flags[flag] as string | undefined;
  }
  function number(flag: string, min: number, max: number, whole = true) {
    const value = text(flag);
    if (value === undefined) return undefined;
    const form = whole ? /^\d+$/ : /^\d*\.?\d+$/;
    if (form.test(value) && +value >= min && +value <= max) return +value;
    const rule = `a ${whole ? "whole " : ""}number from ${min} to ${max}`;
    fail(`--${flag} must be ${rule}, not ${JSON.stringify(value)}`);
  }

  let greeting = text("greeting");
  if (greeting && greeting !== "-" && !greeting.endsWith("\n")) {
    greeting += "\n";
  }
  const seconds = number("timeout", 0.001, Math.floor(MAX_INT32 / 1000), false);
  const parsed = {
    hostname: text("hostname"),
    port: number("port", 0, 65535),
    greeting,
    backlog: number("backlog", 1, MAX_INT32),
    timeout: seconds && Math.round(seconds * 1000),
    maxConnections: number("max-connections", 1, MAX_INT32),
    reusePort: isOn("reuse-port"),
    verbose: isOn("verbose"),
    help: isOn("help"),
    version: isOn("version"),
  };
  const [arg] = unknown;
  if (arg !== undefined) {
    const what = /^-./.test(arg) ? "unknown flag" : "stray word";
    fail(`${what} ${JSON.stringify(arg)}`);
  }
  return parsed;
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

/** Prints a line to standard error. A full disk there stops no server. */
function say(line: string): void {
  try {
    console.error(line);
  } catch {
    // There is nowhere left to say so.
  }
}

/** The signals to stop on, and the exit code when one comes a second time. */
const STOP_SIGNALS: [Deno.Signal, number][] = Deno.build.os === "windows"
  ? [["SIGINT", 130], ["SIGBREAK", 149]]
  : [["SIGINT", 130], ["SIGTERM", 143]];

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

  const { hostname = "0.0.0.0", port = 9000, verbose } = flags;
  const atOnce = new AbortController();
  let server: GreetingServer;
  let greeted = 0;
  let failed = 0;
  let complained = -Infinity;
  let task = "read standard input";
  try {
    if (flags.greeting === "-") {
      flags.greeting = await new Response(Deno.stdin.readable).bytes();
    }
    task = `listen on ${hostPort({ hostname, port })}`;
    server = serve({
      ...flags,
      signal: atOnce.signal,
      onConnectionEnd({ remoteAddr, bytes, milliseconds, error }) {
        if (error) failed++;
        else greeted++;
        if (!verbose) return;
        const how = error ? `failed, ${error.message}` : "greeted";
        const figures = `${bytes} bytes, ${milliseconds.toFixed(1)} ms`;
        say(`${hostPort(remoteAddr)} ${how}: ${figures}`);
      },
      onAcceptError(error) {
        if (performance.now() - complained < 1000) return;
        complained = performance.now();
        say(`Cannot accept, trying again: ${error.message}`);
      },
    });
  } catch (error) {
    say(`Cannot ${task}: ${reasonOf(error)}`);
    return 1;
  }

  let stopping = false;
  let exitCode = 0;
  for (const [signal, code] of STOP_SIGNALS) {
    Deno.addSignalListener(signal, () => {
      if (stopping) {
        exitCode = code;
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
  const { addr } = server;
  const local = ["0.0.0.0", "::"].includes(addr.hostname);
  const nc = `nc ${local ? "localhost" : addr.hostname} ${addr.port}`;
  say(`Listening on ${hostPort(addr)} (try: ${nc})`);
  await server.finished;
  say(`Stopped: ${greeted} greeted, ${failed} failed`);
  return exitCode;
}

if (import.meta.main) Deno.exit(await main(Deno.args));
