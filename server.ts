// Copyright 2026 the greeting server authors. MIT license.

/**
 * A TCP server that writes a greeting to every client and closes the connection.
 *
 * Run it, and connect to it from another terminal:
 *
 * ```sh
 * deno run --allow-net server.ts
 * nc localhost 9000
 * ```
 *
 * Or import {@linkcode serve}.
 *
 * The file follows the eight steps of a socket server. `serve()` makes steps 1 to
 * 4: socket, address, bind, listen. The class `Server` makes steps 5 to 8: accept,
 * read and write, close, shut down. Below them come the mechanisms that the steps
 * call, the options, and the command line.
 *
 * @module
 */

// ============== Steps 1 to 4: socket, address, bind, listen ==============

/**
 * Starts a server that greets every client until it is told to stop. It prints
 * nothing.
 *
 * @example A server and its client
 * ```ts
 * import { serve } from "./server.ts";
 *
 * // Port 0 is any free one.
 * await using server = serve({ port: 0, greeting: "Hello\n" });
 * const conn = await Deno.connect({ port: server.addr.port });
 * console.log(await new Response(conn.readable).text());
 * ```
 *
 * @example The quote of the day (RFC 865), the time (RFC 867), the client's address
 * ```ts
 * import { serve } from "./server.ts";
 *
 * await using quote = serve({ port: 0, greeting: "Less is more.\r\n" });
 * await using time = serve({ port: 0, greeting: () => `${new Date()}\r\n` });
 * await using address = serve({ port: 0, greeting: ({ hostname }) => hostname });
 * ```
 *
 * @throws {TypeError} An option has the wrong type.
 * @throws {RangeError} A number is out of its range.
 * @throws {Deno.errors.AddrInUse} Another program listens on this address.
 * @throws {Deno.errors.NotCapable} `--allow-net` does not allow this address.
 * @throws Any other error of `Deno.listen()`, such as
 * `Deno.errors.AddrNotAvailable` or `Deno.errors.PermissionDenied`.
 * @throws The reason of `signal`, if it is aborted already.
 */
export function serve(options: ServeOptions = {}): GreetingServer {
  const settings = checkOptions(options);
  settings.signal?.throwIfAborted();
  // Deno.listen() makes all four steps. It creates the socket, with the family
  // of the address (IPv4 or IPv6), binds the socket to the address, and listens.
  // From then on the kernel connects clients and queues them for accept().
  const { hostname, port, tcpBacklog, reusePort } = settings;
  // Where deno.json lacks "unstable": ["net"], the type of Deno.listen() lacks
  // reusePort. TypeScript then rejects it in a literal, but not in a variable.
  const address = { hostname, port, tcpBacklog, reusePort };
  return new Server(Deno.listen(address), settings);
}

// ========= Steps 5 to 8: accept, read and write, close, shut down =========

/** A running server. */
class Server implements GreetingServer {
  readonly addr: Deno.NetAddr;
  readonly finished: Promise<void>;
  readonly #listener: Deno.TcpListener;
  readonly #settings: Settings;
  readonly #connections: Connections;
  /** Lets connections begin to write in a fair order. */
  readonly #firstWrites = new WriteGroups();
  /** Tells, at a stop, when the kernel's queue of clients is empty. */
  readonly #queueWatch = new QueueWatch();
  readonly #stop = Promise.withResolvers<void>();

  constructor(listener: Deno.TcpListener, settings: Settings) {
    this.addr = listener.addr;
    this.#listener = listener;
    this.#settings = settings;
    this.#connections = new Connections(settings.timeout, this.#cutOff);
    settings.signal?.addEventListener("abort", this.#abort);
    this.finished = this.#run();
  }

  get connections(): number {
    return this.#connections.size;
  }

  async #run() {
    const accepting = this.#accept(); // goes on until the listener is closed
    await this.#stop.promise;
    await this.#untilQueueIsGreeted();
    this.#closeListener();
    await accepting;
    await this.#connections.allEnded();
    this.#settings.signal?.removeEventListener("abort", this.#abort);
  }

  /**
   * Step 5: accept clients until the listener is closed. Each round of the
   * `for await` loop calls accept().
   */
  async #accept() {
    const { maxConnections, onAcceptError } = this.#settings;
    let failures = 0; // in a row
    while (true) {
      try {
        for await (const conn of this.#listener) {
          failures = 0;
          this.#greet(conn); // not awaited: clients are served side by side
          this.#queueWatch.acceptAnswered(this.#connections.size);
          if (this.#connections.size >= maxConnections) {
            await this.#queueWatch.pauseAccept(this.#connections.nextEnd());
          }
        }
        return;
      } catch (error) {
        // An error of accept() ends the `for await` loop. So the loop starts again.
        this.#queueWatch.acceptAnswered(this.#connections.size);
        if (clientHasLeft(error)) continue;
        callBack(onAcceptError, error as Error);
        // The next call may fail as well, for example because the process is out
        // of file descriptors. Without a pause, the loop would only use up CPU.
        const pause = Math.min(++failures * ACCEPT_RETRY, MAX_ACCEPT_RETRY);
        await this.#queueWatch.pauseAccept(sleep(pause));
      }
    }
  }

  /** Steps 6 and 7: the life of a connection. */
  async #greet(conn: Deno.TcpConn) {
    const { answer, greeting, timeout, signal } = this.#settings;
    const connection = this.#connections.add(conn);
    try {
      // If the abort came just after accept(), #abort has missed this connection.
      signal?.throwIfAborted();

      // Step 6: read, if the client speaks first. What it says is thrown away.
      if (answer) await conn.read(SINK);
      // Then write. First writes take turns, see WriteGroups.
      const bytes = greeting instanceof Uint8Array
        ? greeting
        : toBytes(await greeting(clientOf(conn)));
      await this.#firstWrites.enter();
      try {
        connection.written = await conn.write(bytes.subarray(0, MAX_WRITE));
      } finally {
        this.#firstWrites.leave();
      }
      // The kernel may have taken only a part. A client may send all that it has
      // before it reads, so the server reads while it writes the rest. Otherwise all
      // buffers could be full, and both sides would wait for ever.
      let drained: Promise<void> | undefined;
      while (connection.written < bytes.length) {
        drained ??= drain(conn);
        const { written } = connection;
        const piece = bytes.subarray(written, written + MAX_WRITE);
        connection.written += await conn.write(piece);
      }

      // If the deadline or an abort came before the write resolved, the client has
      // been reported as failed, though the kernel has taken its greeting.
      if (connection.state === "closed") return;
      connection.state = "greeted";
      this.#connections.setDeadline(connection, lingerTime(bytes, timeout));
      this.#report(connection);

      // Half-close: the client sees the end of the greeting now. Then read until
      // the client closes too, and close. A close() with unread data would reset
      // the connection, and a reset can destroy what the client has not read yet
      // (RFC 9112, section 9.6, describes the same for HTTP).
      await conn.closeWrite();
      await (drained ?? drain(conn));
      this.#close(connection);
    } catch (error) {
      this.#close(connection, error);
    }
  }

  /**
   * Step 7: close. A read or write of the connection that is still pending then
   * rejects. `#greet` catches that and calls this again, which does nothing.
   */
  #close(connection: Connection, reason?: unknown) {
    const { conn, state: stateBefore } = connection;
    if (stateBefore === "closed") return;
    connection.state = "closed";
    conn.close();
    this.#connections.remove(connection);
    if (stateBefore === "greeting") this.#report(connection, toError(reason));
  }

  /**
   * Step 8: shut down. `#run` does the rest. An arrow function keeps its `this`, so
   * a user can write `const { shutdown } = serve()`.
   */
  readonly shutdown = (): Promise<void> => {
    this.#stop.resolve();
    return this.finished;
  };

  readonly [Symbol.asyncDispose] = this.shutdown;

  /**
   * Clients in the kernel's queue are already connected, so a stop greets them
   * too. But new clients may keep coming, so the listener is closed at the latest
   * after the timeout. The timeout is counted in four intervals, of which a
   * suspension of the process (Ctrl-Z, a sleeping laptop) uses up one at the most.
   */
  async #untilQueueIsGreeted() {
    let quarters = 4;
    const timer = setInterval(() => {
      if (--quarters === 0) this.#closeListener();
    }, this.#settings.timeout / 4);
    await this.#queueWatch.untilEmpty();
    clearInterval(timer);
  }

  #closeListener() {
    this.#listener[Symbol.dispose](); // close(), but safe to call twice
    this.#queueWatch.giveUp();
  }

  /** Shuts down at once, because `signal` was aborted. */
  readonly #abort = () => {
    this.#closeListener();
    for (const connection of this.#connections.all()) {
      this.#close(connection, this.#settings.signal?.reason);
    }
    this.#stop.resolve();
  };

  /** Closes a connection at its deadline. A greeted one is not reported again. */
  readonly #cutOff = (connection: Connection) => {
    const message = `not greeted in ${this.#settings.timeout} ms`;
    this.#close(connection, new Deno.errors.TimedOut(message));
  };

  /** Tells how the greeting of a client went. */
  #report({ conn, written, acceptedAt }: Connection, error?: Error) {
    callBack(this.#settings.onOutcome, {
      remoteAddr: clientOf(conn),
      bytes: written,
      milliseconds: performance.now() - acceptedAt,
      error,
    });
  }
}

// ============ The open connections, each with its deadline ============

/** One client, from accept() to close(). */
interface Connection {
  readonly conn: Deno.TcpConn;
  /**
   * `greeting`: not all of the greeting is written yet. `greeted`: all of it is
   * written, and the client has not closed its side yet. `closed`: the end.
   */
  state: "greeting" | "greeted" | "closed";
  /** When it was accepted, on the clock of `performance.now()`. */
  readonly acceptedAt: number;
  /** Bytes of the greeting that the kernel has taken. */
  written: number;
  /** Milliseconds until it is cut off. Only {@linkcode Connections} uses this. */
  timeLeft: number;
  /** Its place in the list. Only {@linkcode Connections} uses this. */
  index: number;
}

/**
 * The open connections. One timer for all, the ticker, counts down the time that
 * each of them has left. While the process is suspended, the clock goes on, but the
 * ticker does not. So no client is cut off for time in which nothing was done.
 */
class Connections {
  /** In no order. An array, as adding and removing costs less than in a Set. */
  readonly #open: Connection[] = [];
  readonly #timeout: number;
  readonly #cutOff: (connection: Connection) => void;
  /** The length of a tick, in milliseconds. */
  readonly #tick: number;
  /** It runs only while there are connections: an idle server uses no CPU. */
  #ticker: ReturnType<typeof setInterval> | undefined;
  #onEnd = () => {};

  constructor(timeout: number, cutOff: (connection: Connection) => void) {
    this.#timeout = timeout;
    this.#cutOff = cutOff;
    // Deadlines come at a tick, up to two ticks late. So ticks are short.
    this.#tick = Math.min(250, Math.ceil(timeout / 4));
  }

  get size(): number {
    return this.#open.length;
  }

  /** A copy of the list, for a loop that removes connections. */
  all(): Connection[] {
    return [...this.#open];
  }

  add(conn: Deno.TcpConn): Connection {
    const connection: Connection = {
      conn,
      state: "greeting",
      acceptedAt: performance.now(),
      written: 0,
      timeLeft: NaN, // set below
      index: this.#open.length,
    };
    this.setDeadline(connection, this.#timeout);
    this.#open.push(connection);
    this.#ticker ??= setInterval(() => this.#countDown(), this.#tick);
    return connection;
  }

  /** Removes a connection; the last one of the list takes its place. */
  remove(connection: Connection) {
    const last = this.#open.pop()!;
    if (last !== connection) {
      this.#open[connection.index] = last;
      last.index = connection.index;
    }
    this.#onEnd();
  }

  /** Gives the connection so many milliseconds from now. */
  setDeadline(connection: Connection, milliseconds: number) {
    // One tick more, because the next tick may come at once.
    connection.timeLeft = milliseconds + this.#tick;
  }

  #countDown() {
    for (const connection of this.all()) {
      connection.timeLeft -= this.#tick;
      if (connection.timeLeft <= 0) this.#cutOff(connection);
    }
    if (this.size === 0) this.#stopTicker();
  }

  #stopTicker() {
    clearInterval(this.#ticker);
    this.#ticker = undefined;
  }

  /**
   * Resolves when a connection ends. Only one caller can wait at a time. First the
   * accept loop waits here, and when the loop has ended, `allEnded()`.
   */
  nextEnd(): Promise<void> {
    return new Promise((resolve) => this.#onEnd = resolve);
  }

  /** Resolves when no connection is left. None may be added after that. */
  async allEnded() {
    while (this.size > 0) await this.nextEnd();
    this.#stopTicker();
    // The pending reads and writes of closed connections reject in the next turn of
    // the event loop. If a user's test ended before that turn, Deno's test runner
    // would report them as operations that the test has left behind.
    await sleep(0);
  }
}

// ==================== Writing, reading, and lingering ====================

/**
 * The most bytes that one write is given. Windows takes a write of any size whole.
 * So after one large write, a client that reads nothing would count as greeted.
 */
const MAX_WRITE = 256 * 1024;

/** Receives what all clients send. Nobody reads it, so one buffer serves all. */
const SINK = new Uint8Array(256 * 1024);

/**
 * Reads and throws away what the client sends, until it closes its side. If a
 * client sends without end, each read ends at once. Without the `sleep(0)`, other
 * clients would never have a turn.
 */
async function drain(conn: Deno.TcpConn) {
  try {
    while (await conn.read(SINK) !== null) await sleep(0);
  } catch {
    // The client has reset the connection, or it was closed here.
  }
}

/** Milliseconds. */
const LINGER = 1000;
/** More bytes than this may take longer than LINGER to arrive. */
const LARGE_GREETING = 64 * 1024;

/**
 * How long a greeted client has to close its side, in milliseconds. It is short,
 * because a client that never closes holds its place for that time.
 *
 * But the kernel takes up to 4 MB at once, so a client on a slow link may still be
 * reading a large greeting long after it counts as greeted. If it sends something
 * after the server has closed, a reset destroys what it has not read yet. So it
 * has the whole timeout.
 */
function lingerTime(greeting: Uint8Array, timeout: number): number {
  if (greeting.length > LARGE_GREETING) return timeout;
  return Math.min(timeout, LINGER);
}

/** Each failure in a row adds so many milliseconds to the pause, up to a maximum. */
const ACCEPT_RETRY = 10;
const MAX_ACCEPT_RETRY = 100;

/** Whether accept() failed because the client has already left, by reset or close. */
function clientHasLeft(error: unknown): boolean {
  return error instanceof Deno.errors.NotConnected ||
    error instanceof Deno.errors.ConnectionAborted ||
    error instanceof Deno.errors.ConnectionReset; // on Windows
}

// ==================== First writes: fair to thousands ====================

/**
 * Lets first writes go in groups. While one group is being written, connections
 * that become ready wait for the next group, which starts as a whole.
 *
 * Deno's runtime (tokio) completes at most 128 operations in a turn of its loop.
 * The others are put behind operations that began later. So while new clients keep
 * coming, the same writes can be put off again and again. In groups all clients
 * wait about equally long, because no newer write begins before all writes of the
 * group are done. A group ends soon: a first write goes into an empty buffer, so it
 * does not wait for its client. A read waits for its client, so with `answer` reads
 * stay unfair.
 */
class WriteGroups {
  /** Writes of the present group that are not done yet. */
  #writing = 0;
  /** Starts each write of the next group. */
  #next: (() => void)[] = [];

  /** Waits until the caller may write. It must call `leave()` afterwards. */
  enter(): Promise<void> | undefined {
    if (this.#writing > 0) {
      return new Promise((start) => this.#next.push(start));
    }
    this.#writing = 1;
    return undefined;
  }

  leave() {
    this.#writing--;
    if (this.#writing > 0) return;
    const group = this.#next;
    this.#next = [];
    this.#writing = group.length;
    for (const start of group) start();
  }
}

// ================== At a stop: is the kernel's queue empty? ==================

/**
 * Finds out when accept() has handed over all clients of the kernel's queue. No
 * call tells the length of the queue. But while it holds a client, accept() gives
 * one, though perhaps late, because accept() waits in one line with all other
 * operations of the process. So if accept() has not answered for some turns of the
 * event loop, the queue is empty.
 *
 * How many turns? A turn completes 128 operations, and each open connection has at
 * most three in the line (write, half-close, read). So a turn for every 25
 * connections is more than enough. 16 turns more are for operations of other code.
 */
class QueueWatch {
  /** In how many turns accept() may still give a client. */
  #turnsLeft = 16;
  /** The latest pause, if there was one. */
  #pause: Promise<void> | undefined;

  /**
   * accept() has given a client or an error while so many connections were open.
   * Closing one does not take its operations out of the line, so the number of
   * turns is not lowered then.
   */
  acceptAnswered(open: number) {
    this.#turnsLeft = 16 + open / 25;
  }

  /** Call this for a pause in which accept() is not called. No turn counts then. */
  pauseAccept(until: Promise<void>): Promise<void> {
    this.#pause = until;
    return until;
  }

  /** Resolves when the queue is empty, or after `giveUp()` once a pause has ended. */
  async untilEmpty() {
    while (this.#turnsLeft > 0) {
      await this.#pause;
      this.#turnsLeft--;
      await sleep(0); // a turn
    }
  }

  /** Ends `untilEmpty()`, because the listener is closed. */
  giveUp() {
    this.#turnsLeft = 0;
  }
}

// ============================== Small helpers ==============================

/** The runtime's own timers: a user's tests may fake the global ones later. */
const { setTimeout, setInterval, clearInterval } = globalThis;

function sleep(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

/**
 * Calls a callback of the user soon, when the server's own code has returned. An
 * error of the callback is then an uncaught error and does not break off that code.
 */
function callBack<T>(callback: (value: T) => void, value: T) {
  queueMicrotask(() => callback(value));
}

/** The client's address. An IPv4 address in IPv6 form is shown as IPv4. */
function clientOf({ remoteAddr }: Deno.TcpConn): Deno.NetAddr {
  const [, hostname] = /^::ffff:([\d.]+)$/.exec(remoteAddr.hostname) ?? [];
  return hostname === undefined ? remoteAddr : { ...remoteAddr, hostname };
}

/** Makes an Error of anything that was thrown, or is the reason of an abort. */
function toError(reason: unknown): Error {
  if (Error.isError(reason)) return reason;
  return new Error("not an Error: see its cause", { cause: reason });
}

/** Encodes text, and copies bytes, which their owner may change later. */
function toBytes(greeting: Greeting): Uint8Array {
  if (typeof greeting === "string") return new TextEncoder().encode(greeting);
  if (greeting instanceof Uint8Array) return new Uint8Array(greeting);
  throw new TypeError("greeting must be a string or a Uint8Array");
}

// ================================= Options =================================

/** What a client is sent: bytes as they are, text as UTF-8. Nothing is added. */
export type Greeting = string | Uint8Array;

/** Makes the greeting for one client, whose address it is given. */
export type GreetingFunction = (
  client: Deno.NetAddr,
) => Greeting | Promise<Greeting>;

/** Options of {@linkcode serve}. */
export interface ServeOptions {
  /**
   * The address to listen on. `::` is IPv6 and, except on Windows, IPv4.
   *
   * @default {"0.0.0.0"}
   */
  hostname?: string | undefined;
  /**
   * The TCP port, 0 for any free one.
   *
   * @default {9000}
   */
  port?: number | undefined;
  /**
   * What clients are sent, or a function that returns it or a promise of it. Bytes
   * are copied. If the function throws, rejects or takes longer than `timeout`,
   * only the connection of that client fails. A function that takes longer goes on
   * running: it is not counted by `maxConnections`, nor awaited by `finished`.
   *
   * @default {"Hello from server\n"}
   */
  greeting?: Greeting | GreetingFunction | undefined;
  /**
   * Wait until the client has sent something, or closed its side, before the
   * greeting is made and sent. A client that does neither within `timeout` is cut
   * off. This is for protocols in which the client speaks first, such as HTTP.
   * What the client sends is thrown away.
   *
   * @default {false}
   */
  answer?: boolean | undefined;
  /**
   * How many connections the kernel queues for accept(). The kernel cuts this
   * down to its own maximum: on Linux `net.core.somaxconn`, on macOS 128. A full
   * queue loses clients, so a small backlog is for tests only.
   *
   * @default {65535}
   */
  tcpBacklog?: number | undefined;
  /**
   * How long a client may take for its greeting, in milliseconds. A client that
   * takes longer is cut off. The command line takes this in seconds.
   *
   * After its greeting, a client has a second, or `timeout` if that is less, to
   * close its side. After more than 64 KiB it has the whole `timeout`.
   *
   * @default {5000}
   */
  timeout?: number | undefined;
  /**
   * How many connections are held at once. More wait in the kernel's queue.
   *
   * @default {10000}
   */
  maxConnections?: number | undefined;
  /**
   * Share the port with other processes (SO_REUSEPORT). It has an effect on Linux
   * only. If `deno.json` has no `"unstable": ["net"]`, Deno ends the process with
   * a message, and no exception can be caught.
   *
   * @default {false}
   */
  reusePort?: boolean | undefined;
  /** Aborting it stops the server and closes every connection at once. */
  signal?: AbortSignal | undefined;
  /**
   * Called once for every accepted client, when it is greeted or has failed. An
   * error thrown here is an uncaught error, which by default ends the process.
   */
  onOutcome?: ((outcome: Outcome) => void) | undefined;
  /**
   * Called when accept() fails, for example because the process is out of file
   * descriptors. The server tries again after 10 ms, and after up to 100 ms if it
   * goes on failing. An error thrown here is an uncaught error, too.
   */
  onAcceptError?: ((error: Error) => void) | undefined;
}

/**
 * How the greeting of one client went.
 *
 * A client counts as greeted when the kernel has taken the whole greeting. The
 * kernel sends it from then on; the client may receive it later, or never if the
 * connection breaks.
 */
export interface Outcome {
  /** The client's address. */
  remoteAddr: Deno.NetAddr;
  /**
   * How many bytes of the greeting the kernel has taken. If the client was cut off
   * or the server aborted, the kernel may have taken one write more (256 KiB).
   */
  bytes: number;
  /** The time from accept() until now, in milliseconds. */
  milliseconds: number;
  /**
   * Why the client was not greeted, or undefined if it was. It is a
   * `Deno.errors.TimedOut` if the client was cut off at its deadline. Otherwise it
   * is the reason of the abort, what the greeting function threw, or the error of
   * the read or write. If that is no Error, it is the `cause` of an Error.
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
   * Stops the server and returns `finished`. It greets the clients that are in
   * the kernel's queue, then it stops listening and lets open connections end.
   *
   * It accepts for `timeout` at the most. If more clients are in the queue than it
   * can accept in that time, because `maxConnections` is reached or because new
   * clients keep coming, the rest of the queue is reset.
   */
  shutdown(): Promise<void>;
}

/** The values of options that are left out. */
const DEFAULTS = {
  hostname: "0.0.0.0",
  port: 9000,
  greeting: "Hello from server\n",
  answer: false,
  tcpBacklog: 65535,
  timeout: 5000,
  maxConnections: 10000,
  reusePort: false,
};

/** The largest number that listen(2) and setTimeout() take. */
const MAX_INT32 = 2 ** 31 - 1;

/** From a minimum to a maximum. */
type Range = readonly [min: number, max: number];

/** The options that are whole numbers. */
const RANGES = {
  port: [0, 65535],
  tcpBacklog: [1, MAX_INT32],
  timeout: [1, MAX_INT32],
  maxConnections: [1, MAX_INT32],
} satisfies Record<string, Range>;

/** Checked options, with their defaults. */
type Settings = ReturnType<typeof checkOptions>;

/**
 * Checks every option. Otherwise Deno and the kernel would silently use another
 * value, or fail at the first client. Only undefined stands for the default.
 */
function checkOptions(options: ServeOptions) {
  if (typeof options !== "object") {
    throw new TypeError("options must be an object"); // not serve(8080)
  }
  const settings = {
    ...DEFAULTS,
    greeting: DEFAULTS.greeting as Greeting | GreetingFunction,
    onOutcome: (_: Outcome) => {},
    onAcceptError: (_: Error) => {},
  };
  for (const [name, standard] of Object.entries(settings)) {
    const value = options[name as keyof typeof settings];
    if (value === undefined) continue;
    if (name !== "greeting" && typeof value !== typeof standard) {
      throw new TypeError(`${name} must be a ${typeof standard}`);
    }
    Object.assign(settings, { [name]: value });
  }
  for (const [name, [min, max]] of Object.entries(RANGES)) {
    const value = settings[name as keyof typeof RANGES];
    if (Number.isInteger(value) && value >= min && value <= max) continue;
    const rule = `${name} must be a whole number from ${min} to ${max}`;
    throw new RangeError(`${rule}, not ${value}`);
  }
  const { signal } = options;
  if (signal !== undefined && !(signal instanceof AbortSignal)) {
    throw new TypeError("signal must be an AbortSignal");
  }
  // A fixed greeting is encoded once, not for every client.
  const greeting = typeof settings.greeting === "function"
    ? settings.greeting
    : toBytes(settings.greeting);
  return { ...settings, greeting, signal };
}

// ============================= The command line =============================

/** Repeats `deno.json`, because a copy of this file alone does not have that. */
const VERSION = "1.0.0";

const HELP = `Writes a greeting to every TCP client and closes the connection.

Usage: deno run --allow-net server.ts [options]

  -p, --port <port>          TCP port, 0 for any free one (${DEFAULTS.port})
  -H, --hostname <host>      address to listen on (${DEFAULTS.hostname}); :: is
                             IPv6 and, except on Windows, IPv4
  -g, --greeting <text>      what every client is sent; a newline is added if
                             it has none (${DEFAULTS.greeting.trimEnd()});
                             --greeting=- sends standard input, byte for byte
  -b, --backlog <n>          connections that the kernel queues for accept()
                             (${DEFAULTS.tcpBacklog}, which the kernel cuts down to its maximum);
                             a full queue loses clients
  -t, --timeout <seconds>    how long a client may take for its greeting;
                             fractions are allowed (${DEFAULTS.timeout / 1000})
  -c, --max-connections <n>  connections held at once; more wait in the
                             kernel's queue (${DEFAULTS.maxConnections})
  -a, --answer               wait until the client has sent something, or closed
                             its side, before the greeting is sent
  -r, --reuse-port           share the port with other processes (Linux)
  -v, --verbose              print a line for every connection
  -h, --help                 print this help
  -V, --version              print the version
`;

/** The flags, by their letters: those with a value, and those without. */
const VALUES: Record<string, string> = {
  p: "port",
  H: "hostname",
  g: "greeting",
  b: "backlog",
  t: "timeout",
  c: "max-connections",
};
const SWITCHES = {
  r: "reuse-port",
  a: "answer",
  v: "verbose",
  h: "help",
  V: "version",
};

/**
 * Writes -gTEXT and -g=TEXT as --greeting=TEXT. parseArgs() would cut TEXT at an =
 * or a line break, or take its letters for flags.
 */
function spellOut(arg: string): string {
  // A letter, perhaps a =, and then anything, line breaks too.
  const [, letter = "", value] = /^-([a-zA-Z])=?(.*)$/s.exec(arg) ?? [];
  const flag = VALUES[letter];
  return flag && arg.length > 2 ? `--${flag}=${value}` : arg;
}

/** Finds the flags, with their values as text, and the mistakes among the rest. */
async function findFlags(args: string[]) {
  // Loaded here, so that the module works where this package is not installed.
  const { parseArgs } = await import("@std/cli/parse-args")
    .catch(cannot("load @std/cli/parse-args"));
  const unknown: string[] = [];
  const { _: words, ...flags } = parseArgs(args.map(spellOut), {
    alias: { ...VALUES, ...SWITCHES },
    string: Object.values(VALUES),
    default: {
      port: `${DEFAULTS.port}`,
      hostname: DEFAULTS.hostname,
      greeting: DEFAULTS.greeting,
      backlog: `${DEFAULTS.tcpBacklog}`,
      timeout: `${DEFAULTS.timeout / 1000}`,
      "max-connections": `${DEFAULTS.maxConnections}`,
    },
    // The switches are not declared as `boolean`, because then parseArgs() would
    // take --verbose=no for true. isOn() checks them.
    unknown(arg: string) {
      unknown.push(arg);
      return false;
    },
  });
  unknown.push(...words.map(String)); // the words after `--`
  return { flags: flags as Record<string, unknown>, unknown };
}

/**
 * Parses a command line. A greeting of `-` stands for standard input. This function
 * is exported for the tests.
 *
 * @throws {Error} There is an unknown flag, a stray word, or a bad or missing
 * value. The message is one line.
 * @ignore
 */
export async function parseFlags(args: string[]): Promise<
  typeof DEFAULTS & { verbose: boolean; help: boolean; version: boolean }
> {
  const { flags, unknown: [mistake] } = await findFlags(args);
  function text(flag: string): string {
    if (flags[flag] !== "") return flags[flag] as string;
    throw new Error(`--${flag} needs a value: --${flag}=...`);
  }
  // Number() alone would also take " 80", 0x50 and 1e3.
  function number(flag: string, [min, max]: Range, form = /^\d+$/) {
    const value = form.test(text(flag)) ? Number(text(flag)) : NaN;
    if (value >= min && value <= max) return value;
    const kind = Number.isInteger(min) ? "whole number" : "number";
    const rule = `--${flag} must be a ${kind} from ${min} to ${max}`;
    throw new Error(`${rule}, not ${JSON.stringify(text(flag))}`);
  }
  function isOn(flag: string): boolean {
    const value = flags[flag] ?? false;
    if (typeof value === "boolean") return value;
    const given = JSON.stringify(value);
    throw new Error(`--${flag} takes no value, and was given ${given}`);
  }
  const greeting = text("greeting");
  const needsNewline = greeting !== "-" && !greeting.endsWith("\n");
  const seconds: Range = [0.001, Math.floor(MAX_INT32 / 1000)];
  const parsed = {
    hostname: text("hostname"),
    port: number("port", RANGES.port),
    greeting: needsNewline ? greeting + "\n" : greeting,
    tcpBacklog: number("backlog", RANGES.tcpBacklog),
    timeout: Math.round(
      1000 * number("timeout", seconds, /^(\d+|\d*\.\d+)$/),
    ),
    maxConnections: number("max-connections", RANGES.maxConnections),
    reusePort: isOn("reuse-port"),
    answer: isOn("answer"),
    verbose: isOn("verbose"),
    help: isOn("help"),
    version: isOn("version"),
  };
  if (mistake === undefined) return parsed;
  const kind = /^-./.test(mistake) ? "unknown flag" : "stray word";
  throw new Error(`${kind} ${JSON.stringify(mistake)}`);
}

/** `host:port`, with brackets around an IPv6 address. */
function hostPort({ hostname, port }: { hostname: string; port: number }) {
  return `${hostname.includes(":") ? `[${hostname}]` : hostname}:${port}`;
}

/** A client's command that works on this machine. */
function tryCommand({ hostname, port }: Deno.NetAddr): string {
  // Not `localhost`: for some clients that is ::1, where 0.0.0.0 does not listen.
  const any: Record<string, string> = { "0.0.0.0": "127.0.0.1", "::": "::1" };
  return `nc ${any[hostname] ?? hostname} ${port}`;
}

function lineFor({ remoteAddr, bytes, milliseconds, error }: Outcome): string {
  const how = error ? `failed, ${error.message}` : "greeted";
  const figures = `${bytes} bytes, ${milliseconds.toFixed(1)} ms`;
  return `${hostPort(remoteAddr)} ${how}: ${figures}`;
}

/**
 * Standard error, behind a buffer of 1 MiB: a reader that stalls delays no greeting.
 * While the buffer is full, lines are dropped. If standard error fails, there is no
 * place to say so.
 */
const log = new WritableStream<Uint8Array>(
  { write: (line) => writeAll(Deno.stderr, line).catch(() => {}) },
  new ByteLengthQueuingStrategy({ highWaterMark: 1 << 20 }),
).getWriter();

/** Prints a line. Resolves when it is written. */
async function say(line: string) {
  // Control and format characters are escaped, because a terminal would obey them,
  // and a user's text may hold them.
  const printable = line.replace(/\s+/g, " ").replace(
    /[\p{Cc}\p{Cf}]/gu,
    (character) => `\\u{${character.codePointAt(0)!.toString(16)}}`,
  );
  if (log.desiredSize! > 0) await log.write(encode(printable + "\n"));
}

function encode(text: string): Uint8Array {
  return new TextEncoder().encode(text);
}

async function writeAll(stream: typeof Deno.stderr, bytes: Uint8Array) {
  for (let written = 0; written < bytes.length;) {
    try {
      written += await stream.write(bytes.subarray(written));
    } catch (error) {
      // The pipe is full. A write to a blocking pipe would wait. But if another
      // process has made the pipe non-blocking, the write fails instead.
      if (!(error instanceof Deno.errors.WouldBlock)) throw error;
      await sleep(10);
    }
  }
}

/** Prints a last line, and ends the process, half a second later at the latest. */
async function exit(exitCode: number, line: string): Promise<never> {
  await Promise.race([say(line), sleep(500)]);
  Deno.exit(exitCode);
}

/** Makes a handler for `catch()`. It says what could not be done, and exits. */
function cannot(task: string) {
  return ({ message }: Error) => exit(1, `Cannot ${task}: ${message}`);
}

async function readGreeting(): Promise<Uint8Array> {
  if (Deno.stdin.isTerminal()) {
    const keys = Deno.build.os === "windows" ? "Ctrl-Z and Enter" : "Ctrl-D";
    say(`Reading the greeting from the terminal; end it with ${keys}`);
  }
  const greeting = await new Response(Deno.stdin.readable).bytes();
  if (greeting.length === 0) throw new Error("it is empty");
  return greeting;
}

/**
 * Resolves at the first signal that asks the server to stop. Half a second later
 * the signals have their default effect again, so that a second one ends the
 * process. Not sooner: under `deno task` one Ctrl-C arrives twice.
 */
function stopSignal(): Promise<void> {
  const signals: Deno.Signal[] = Deno.build.os === "windows"
    ? ["SIGINT", "SIGBREAK"]
    : ["SIGINT", "SIGTERM", "SIGHUP"];
  return new Promise((resolve) => {
    async function stop() {
      resolve();
      await sleep(500);
      for (const signal of signals) Deno.removeSignalListener(signal, stop);
    }
    for (const signal of signals) Deno.addSignalListener(signal, stop);
  });
}

async function main() {
  const { help, version, verbose, ...options } = await parseFlags(Deno.args)
    .catch(({ message }) => exit(2, `${message} (see --help)`));
  if (help || version) {
    const output = help ? HELP : `@greeting/server ${VERSION}\n`;
    return await writeAll(Deno.stdout, encode(output))
      .catch(cannot("write to standard output"));
  }
  const greeting = options.greeting === "-"
    ? await readGreeting().catch(cannot("read standard input"))
    : options.greeting;

  let greeted = 0;
  let failed = 0;
  let toldAt = -Infinity;
  // Promise.try() hands what serve() throws to catch().
  const server = await Promise.try(serve, {
    ...options,
    greeting,
    onOutcome(outcome) {
      if (outcome.error) failed++;
      else greeted++;
      if (verbose) say(lineFor(outcome));
    },
    onAcceptError(error) {
      // One line a second is enough: accept() is tried many times a second.
      if (performance.now() - toldAt < 1000) return;
      toldAt = performance.now();
      say(`Cannot accept, trying again: ${error.message}`);
    },
  }).catch(cannot(`listen on ${hostPort(options)}`));

  const stopped = stopSignal(); // a reader of the next line may signal at once
  const { addr } = server;
  say(`Listening on ${hostPort(addr)} (try: ${tryCommand(addr)})`);
  await stopped;

  server.shutdown();
  const left = server.connections;
  if (left > 0) {
    say(
      `Stopping: waiting for clients (${left} left); a second signal ends it`,
    );
  }
  await server.finished;
  await exit(0, `Stopped: ${greeted} greeted, ${failed} failed`);
}

if (import.meta.main) await main();
