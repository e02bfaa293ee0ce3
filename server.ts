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

import { setImmediate } from "node:timers";

// ============== Steps 1 to 4: socket, address, bind, listen ==============

/**
 * Starts a server that greets every client until it is told to stop. It prints
 * nothing.
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
  /** Tells every connection when it may begin to write. */
  readonly #firstWrites = new WriteGroups();
  /** Tells, at a stop, when the kernel's queue of clients is empty. */
  readonly #queueWatch = new QueueWatch();
  readonly #stop = Promise.withResolvers<void>();

  constructor(listener: Deno.TcpListener, settings: Settings) {
    this.addr = listener.addr as Deno.NetAddr;
    this.#listener = listener;
    this.#settings = settings;
    this.#connections = new Connections(settings.timeout, this.#cutOff);
    settings.signal?.addEventListener("abort", this.#abort);
    this.finished = this.#run();
  }

  get connections(): number {
    return this.#connections.size;
  }

  /** The life of the server. */
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
   * `for await` loop calls accept(). `#queueWatch` is told of each answer of
   * accept(), and of each pause in which it is not called.
   */
  async #accept() {
    const { maxConnections, onAcceptError } = this.#settings;
    let failures = 0; // one after the other
    while (true) {
      try {
        for await (const conn of this.#listener) {
          failures = 0;
          this.#serve(conn); // not awaited: clients are served side by side
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
        if (!clientMayHaveLeft(error)) callBack(onAcceptError, error as Error);
        // The next call may fail as well, for example because the process is out
        // of file descriptors. Without a pause, the loop would only use up CPU.
        const pause = Math.min(++failures * ACCEPT_RETRY, MAX_ACCEPT_RETRY);
        await this.#queueWatch.pauseAccept(sleep(pause));
      }
    }
  }

  /** Steps 6 and 7: the life of a connection. */
  async #serve(conn: Deno.TcpConn) {
    const { answer, greeting, timeout, signal } = this.#settings;
    const connection = this.#connections.add(conn, timeout);
    try {
      signal?.throwIfAborted(); // accept() had resolved already at the abort

      // Step 6: read, if the client speaks first. What it says is thrown away.
      if (answer) {
        connection.waitsForClient = true;
        await conn.read(SINK);
        connection.waitsForClient = false;
      }
      // Then write. First writes take turns, see WriteGroups.
      const bytes = greeting instanceof Uint8Array
        ? greeting
        : toBytes(await greeting(clientOf(conn)));
      await this.#firstWrites.turn();
      try {
        connection.written = await conn.write(pieceOf(bytes, 0));
      } finally {
        this.#firstWrites.done();
      }
      let drained: Promise<void> | undefined;
      if (connection.written < bytes.length) {
        drained = drain(conn); // reads while the next line writes
        await writeRest(connection, bytes);
      }
      // If the deadline came before the write resolved, the client has been
      // reported as failed, though the kernel has taken its greeting.
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
   * rejects. `#serve` catches that and calls this again, which does nothing.
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
   * after the timeout. It is counted in four intervals: if the process is suspended
   * for long, only one of them ends meanwhile, and the others are for the clients.
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
    const what = connection.waitsForClient
      ? "the client sent nothing"
      : "not greeted";
    const message = `${what} in ${this.#settings.timeout} ms`;
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

// The eight steps end here. Below are the mechanisms that they call, then the
// options, then an ordinary command line, which has nothing to do with sockets.

// ============ The open connections, each with its deadline ============

/** One client, from accept() to close(). */
interface Connection {
  readonly conn: Deno.TcpConn;
  /**
   * `greeting`: not all of the greeting is written yet. `greeted`: all of it is
   * written, and the client has not closed its side yet. `closed`: the end.
   */
  state: "greeting" | "greeted" | "closed";
  /** Whether the server still waits for the client to speak first. */
  waitsForClient: boolean;
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
  /** The length of a tick, in milliseconds. */
  readonly #tick: number;
  readonly #cutOff: (connection: Connection) => void;
  /** It runs only while there are connections: an idle server uses no CPU. */
  #ticker: ReturnType<typeof setInterval> | undefined;
  #onEnd = () => {};

  constructor(timeout: number, cutOff: (connection: Connection) => void) {
    // Deadlines come at a tick, up to two ticks late. So ticks are short.
    this.#tick = Math.min(250, Math.ceil(timeout / 4));
    this.#cutOff = cutOff;
  }

  get size(): number {
    return this.#open.length;
  }

  /** A copy of the list, for a loop that removes connections. */
  all(): Connection[] {
    return [...this.#open];
  }

  add(conn: Deno.TcpConn, timeout: number): Connection {
    const connection: Connection = {
      conn,
      state: "greeting",
      waitsForClient: false,
      acceptedAt: performance.now(),
      written: 0,
      timeLeft: NaN, // set below
      index: this.#open.length,
    };
    this.setDeadline(connection, timeout);
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

// ================ Reading, writing and waiting for a client ================

/**
 * Writes what is left of a greeting, when the kernel has taken a part. The server
 * has to read meanwhile. A client may send all that it has before it reads. Without
 * a reader, all buffers would be full, and both sides would wait for ever.
 */
async function writeRest(connection: Connection, greeting: Uint8Array) {
  while (connection.written < greeting.length) {
    const piece = pieceOf(greeting, connection.written);
    connection.written += await connection.conn.write(piece);
  }
}

/** The most bytes that one write is given. */
const MAX_WRITE = 256 * 1024;

/**
 * The piece of a greeting to write next. On Windows, the kernel takes a write of
 * any size if its buffer is not full. A large greeting in one write would be taken
 * at once, and a client that reads nothing would count as greeted.
 */
function pieceOf(greeting: Uint8Array, start: number): Uint8Array {
  return greeting.subarray(start, start + MAX_WRITE);
}

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

/** The time to close its side after a small greeting, in milliseconds. */
const LINGER = 1000;
/**
 * Above this many bytes, the client may need longer to read the greeting. A link
 * of 0.5 Mbit/s carries as much in a second.
 */
const LARGE_GREETING = 64 * 1024;

/**
 * How long a greeted client has to close its side. LINGER is short, because a
 * client that never closes holds its place for that time.
 *
 * But the kernel's buffer holds up to 4 MB, so a client on a slow link may still be
 * reading a large greeting long after it counts as greeted. If it sends something
 * after the server has closed, a reset destroys the rest. So it has more time.
 */
function lingerTime(greeting: Uint8Array, timeout: number): number {
  if (greeting.length > LARGE_GREETING) return timeout;
  return Math.min(timeout, LINGER);
}

/** The pause after a failed accept(), and after many of them, in milliseconds. */
const ACCEPT_RETRY = 10;
const MAX_ACCEPT_RETRY = 100;

/** Whether accept() failed because the client has already left. */
function clientHasLeft(error: unknown): boolean {
  return error instanceof Deno.errors.NotConnected ||
    error instanceof Deno.errors.ConnectionAborted ||
    error instanceof Deno.errors.ConnectionReset; // on Windows
}

/**
 * Whether accept() may have failed because the client has left. On macOS it then
 * fails with EINVAL, but it does so, too, if the listening socket is broken. Deno
 * throws a TypeError for EINVAL.
 */
function clientMayHaveLeft(error: unknown): boolean {
  return Deno.build.os === "darwin" && error instanceof TypeError;
}

// ==================== First writes: fair to thousands ====================

/**
 * Lets first writes go in groups. While one group is being written, connections
 * that become ready wait for the next group, which starts as a whole.
 *
 * Deno's runtime (tokio) completes at most 128 operations in a turn of its loop.
 * The other writes go to the end of its line, behind writes that began later. While
 * new clients keep coming, that can happen to the same writes again and again. In
 * groups all clients wait about equally long, because no newer write begins before
 * all writes of the group are done.
 *
 * A group ends soon. A first write goes into an empty buffer, so it does not wait
 * for its client. It waits only if the kernel is out of memory, and then until the
 * connection is closed at its deadline, which makes the write reject.
 */
class WriteGroups {
  /** Writes of the present group that are not done yet. */
  #writing = 0;
  /** Starts each write of the next group. */
  #next: (() => void)[] = [];

  /** Waits until the caller may write. It must call `done()` afterwards. */
  turn(): Promise<void> | undefined {
    if (this.#writing > 0) {
      return new Promise((start) => this.#next.push(start));
    }
    this.#writing = 1;
    return undefined;
  }

  done() {
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
 * one, though perhaps late. So if accept() has not answered for long enough, the
 * queue is empty.
 *
 * How long? In the runtime, accept() waits in one line with all other operations.
 * Each open connection has up to three there (write, half-close, read), and 128
 * leave the line in a turn of the event loop. So 43 connections delay accept() by a
 * turn. The wait is a round for every 25 connections, as a margin, and 16 more for
 * operations of other code. A round has five turns: while other code keeps the
 * loop busy, the runtime looks for new clients only every 61 turns (tokio's
 * `event_interval`), and 16 rounds have 80.
 */
class QueueWatch {
  /** In how many rounds accept() may still give a client. */
  #roundsLeft = 16;
  /** Resolves when accept() is called again. */
  #pause: Promise<void> | undefined;

  /**
   * accept() has given a client or an error, while `open` connections were open.
   * The wait does not become shorter when some of them are closed, because their
   * operations are in the line already.
   */
  acceptAnswered(open: number) {
    this.#roundsLeft = 16 + open / 25;
  }

  /** Remembers a pause, in which accept() is not called and no round counts. */
  pauseAccept(until: Promise<void>): Promise<void> {
    this.#pause = until;
    return until;
  }

  /** Resolves when the queue is empty, or after `giveUp()` and a pause. */
  async untilEmpty() {
    while (this.#roundsLeft > 0) {
      await this.#pause;
      this.#roundsLeft--;
      for (let turn = 0; turn < 4; turn++) await nextTurn();
      await sleep(0); // a turn in which the event loop can rest
    }
  }

  /**
   * The listener is closed, so accept() gives no more clients. A pause goes on. It
   * ends after 100 ms at the latest or, if no place was free, when a client leaves.
   */
  giveUp() {
    this.#roundsLeft = 0;
  }
}

// ============================== Small helpers ==============================

/**
 * The runtime's own timers, kept since this module was loaded. If a test fakes the
 * timers later (FakeTime, sinon), the server still works.
 */
const { setTimeout, setInterval, clearInterval, queueMicrotask } = globalThis;

function sleep(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

function nextTurn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}

/**
 * Calls a callback of the user soon, when the server's own code has returned. An
 * error of the callback is then an uncaught error and does not break off that code.
 * If the callback aborts the signal, that code is not in the middle of its work.
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
  return new Error(`not an Error: ${show(reason)}`, { cause: reason });
}

/** A value for a message. Objects are only named: to print one may throw. */
function show(value: unknown): string {
  if (typeof value === "string") return JSON.stringify(value);
  if (typeof value === "function") return "a function";
  if (typeof value === "object" && value !== null) return "an object";
  return String(value);
}

/** Encodes text, and copies bytes, which their owner may change later. */
function toBytes(greeting: Greeting): Uint8Array {
  if (typeof greeting === "string") return new TextEncoder().encode(greeting);
  if (greeting instanceof Uint8Array) return new Uint8Array(greeting);
  const rule = "greeting must be a string or a Uint8Array";
  throw new TypeError(`${rule}, not ${show(greeting)}`);
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
   * Called once for every client, when it has been greeted or could not be. An
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
  /** How many bytes of the greeting the kernel has taken. */
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

/**
 * The values of options that are left out. `deno doc` need not show them again.
 *
 * @ignore
 */
const DEFAULTS = {
  hostname: "0.0.0.0",
  port: 9000,
  greeting: "Hello from server\n",
  tcpBacklog: 65535,
  timeout: 5000,
  maxConnections: 10000,
  reusePort: false,
  answer: false,
};

/** Checked options, with their defaults. */
type Settings = ReturnType<typeof checkOptions>;

/** The largest number that listen(2) and setTimeout() take. */
const MAX_INT32 = 2 ** 31 - 1;

/**
 * Checks every option. Otherwise Deno and the kernel would silently use another
 * value, or fail at the first client. Only undefined stands for the default.
 */
function checkOptions(options: ServeOptions) {
  function check(isRight: boolean, name: string, rule: string, value: unknown) {
    if (isRight) return;
    throw new TypeError(`${name} must be ${rule}, not ${show(value)}`);
  }
  function checkNumber(name: string, value: number, min: number, max: number) {
    check(typeof value === "number", name, "a number", value);
    if (Number.isInteger(value) && value >= min && value <= max) return;
    const rule = `${name} must be a whole number from ${min} to ${max}`;
    throw new RangeError(`${rule}, not ${value}`);
  }
  const isObject = typeof options === "object" && options !== null;
  check(isObject, "options", "an object", options);
  const {
    hostname = DEFAULTS.hostname,
    port = DEFAULTS.port,
    greeting = DEFAULTS.greeting,
    answer = DEFAULTS.answer,
    tcpBacklog = DEFAULTS.tcpBacklog,
    timeout = DEFAULTS.timeout,
    maxConnections = DEFAULTS.maxConnections,
    reusePort = DEFAULTS.reusePort,
    signal,
    onOutcome = () => {},
    onAcceptError = () => {},
  } = options;
  check(typeof hostname === "string", "hostname", "a string", hostname);
  checkNumber("port", port, 0, 65535);
  check(typeof answer === "boolean", "answer", "a boolean", answer);
  checkNumber("tcpBacklog", tcpBacklog, 1, MAX_INT32);
  checkNumber("timeout", timeout, 1, MAX_INT32);
  checkNumber("maxConnections", maxConnections, 1, MAX_INT32);
  check(typeof reusePort === "boolean", "reusePort", "a boolean", reusePort);
  const isSignal = signal === undefined || signal instanceof AbortSignal;
  check(isSignal, "signal", "an AbortSignal", signal);
  check(typeof onOutcome === "function", "onOutcome", "a function", onOutcome);
  const isFunction = typeof onAcceptError === "function";
  check(isFunction, "onAcceptError", "a function", onAcceptError);
  return {
    hostname,
    port,
    // A fixed greeting is encoded once, not for every client.
    greeting: typeof greeting === "function" ? greeting : toBytes(greeting),
    answer,
    tcpBacklog,
    timeout,
    maxConnections,
    reusePort,
    signal,
    onOutcome,
    onAcceptError,
  };
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

/** The flags that take a value, by their letters. */
// deno-fmt-ignore
const VALUE_FLAGS: Record<string, string> = { p: "port", H: "hostname",
  g: "greeting", b: "backlog", t: "timeout", c: "max-connections" };

/** The flags that take no value. */
// deno-fmt-ignore
const SWITCHES = { r: "reuse-port", a: "answer", v: "verbose", h: "help",
  V: "version" };

/**
 * Writes -gTEXT and -g=TEXT as --greeting=TEXT, but not a -g alone. Otherwise
 * parseArgs() would take the letters of -gTEXT for flags, and cut -g=TEXT at a line
 * break.
 */
function spellOut(arg: string): string {
  const [, letter = "", value] = /^-(\w)(?:=|(?=.))(.*)$/s.exec(arg) ?? [];
  const flag = VALUE_FLAGS[letter];
  return flag === undefined ? arg : `--${flag}=${value}`;
}

/** Finds the values of the flags, and the other arguments, which are mistakes. */
async function findFlags(args: string[]) {
  // Loaded here, so that the module works where this package is not installed.
  const { parseArgs } = await import("@std/cli/parse-args");
  const unknown: string[] = [];
  const found: Record<string, unknown> = parseArgs(args.map(spellOut), {
    alias: { ...VALUE_FLAGS, ...SWITCHES },
    string: Object.values(VALUE_FLAGS),
    default: {
      port: `${DEFAULTS.port}`,
      hostname: DEFAULTS.hostname,
      greeting: DEFAULTS.greeting,
      backlog: `${DEFAULTS.tcpBacklog}`,
      timeout: `${DEFAULTS.timeout / 1000}`,
      "max-connections": `${DEFAULTS.maxConnections}`,
    },
    // The switches are not declared as `boolean`, because then parseArgs() would
    // take --verbose=no for true.
    unknown: (arg: string) => {
      unknown.push(arg);
      return false;
    },
  });
  // `unknown` has the other words. Those after `--` are here.
  const { _: wordsAfterDashes, ...values } = found;
  return { values, others: [...unknown, ...wordsAfterDashes as string[]] };
}

/**
 * Parses a command line. A greeting of `-` stands for standard input. This function
 * is exported for the tests.
 *
 * @throws {Error} There is an unknown flag, a stray word, or a bad or missing
 * value. The message is one line.
 * @throws {TypeError} The package @std/cli cannot be loaded.
 * @ignore
 */
export async function parseFlags(args: string[]): Promise<
  typeof DEFAULTS & { verbose: boolean; help: boolean; version: boolean }
> {
  const { values, others: [other] } = await findFlags(args);
  function text(flag: string): string {
    if (values[flag] !== "") return values[flag] as string;
    throw new Error(`--${flag} needs a value: --${flag}=...`);
  }
  function number(flag: string, min: number, max: number, fractions = false) {
    const value = text(flag);
    // Number() alone would also take " 80", 0x50 and 1e3.
    const form = fractions ? /^(\d+|\d*\.\d+)$/ : /^\d+$/;
    const parsed = form.test(value) ? Number(value) : NaN;
    if (parsed >= min && parsed <= max) return parsed;
    const kind = fractions ? "number" : "whole number";
    const rule = `--${flag} must be a ${kind} from ${min} to ${max}`;
    throw new RangeError(`${rule}, not ${show(value)}`);
  }
  function isOn(flag: string): boolean {
    const value = values[flag] ?? false;
    if (typeof value === "boolean") return value;
    throw new Error(`--${flag} takes no value, and was given ${show(value)}`);
  }

  const greeting = text("greeting");
  const needsNewline = greeting !== "-" && !greeting.endsWith("\n");
  const maxSeconds = Math.floor(MAX_INT32 / 1000);
  const flags = {
    hostname: text("hostname"),
    port: number("port", 0, 65535),
    greeting: needsNewline ? greeting + "\n" : greeting,
    tcpBacklog: number("backlog", 1, MAX_INT32),
    timeout: Math.round(1000 * number("timeout", 0.001, maxSeconds, true)),
    maxConnections: number("max-connections", 1, MAX_INT32),
    reusePort: isOn("reuse-port"),
    answer: isOn("answer"),
    verbose: isOn("verbose"),
    help: isOn("help"),
    version: isOn("version"),
  };
  if (other === undefined) return flags;
  const kind = /^-./.test(other) ? "unknown flag" : "stray word";
  throw new Error(`${kind} ${show(other)}`);
}

/** `host:port`, with brackets around an IPv6 address. */
function hostPort({ hostname, port }: { hostname: string; port: number }) {
  const isBareIPv6 = hostname.includes(":") && !hostname.startsWith("[");
  return `${isBareIPv6 ? `[${hostname}]` : hostname}:${port}`;
}

/** A client's command that works on this machine. */
function clientFor({ hostname, port }: Deno.NetAddr): string {
  // Not `localhost`, which may mean ::1, where a server on 0.0.0.0 does not listen.
  const any: Record<string, string> = { "0.0.0.0": "127.0.0.1", "::": "::1" };
  return `nc ${any[hostname] ?? hostname} ${port}`;
}

function lineFor({ remoteAddr, bytes, milliseconds, error }: Outcome): string {
  const how = error ? `failed, ${error.message}` : "greeted";
  const figures = `${bytes} bytes, ${milliseconds.toFixed(1)} ms`;
  return `${hostPort(remoteAddr)} ${how}: ${figures}`;
}

/**
 * Prints lines to standard error, without waiting for it: a reader that stalls does
 * not delay a greeting, and delays the end by half a second at the most.
 */
class Log {
  /** The most that is kept for a slow reader. Later lines are dropped. */
  static readonly #LIMIT = 1 << 20;
  #waiting = "";
  #writer: Promise<void> | undefined;

  say(line: string) {
    if (this.#waiting.length + line.length > Log.#LIMIT) return;
    this.#waiting += printable(line) + "\n";
    this.#writer ??= this.#write();
  }

  async #write() {
    while (this.#waiting !== "") {
      const lines = this.#waiting;
      this.#waiting = "";
      // If standard error fails, there is no place to say so.
      await writeAll(Deno.stderr, lines).catch(() => {});
    }
    this.#writer = undefined;
  }

  /** Waits until all is written, or for half a second. */
  async flush() {
    await Promise.race([this.#writer, sleep(500)]);
  }
}

/**
 * One line of text. Control and format characters are escaped, because a terminal
 * would obey them, and a user's text may hold them.
 */
function printable(line: string): string {
  return line.replace(/\s+/g, " ").replace(
    /[\p{Cc}\p{Cf}]/gu,
    (character) => `\\u{${character.codePointAt(0)!.toString(16)}}`,
  );
}

async function writeAll(stream: typeof Deno.stderr, text: string) {
  const bytes = new TextEncoder().encode(text);
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

const log = new Log();

/** Prints a last line, and ends the process when it is written. */
async function exit(exitCode: number, line: string): Promise<never> {
  log.say(line);
  await log.flush();
  Deno.exit(exitCode);
}

/** Makes a handler for `catch()`. It says what could not be done, and exits. */
function cannot(task: string) {
  return ({ message }: Error) => exit(1, `Cannot ${task}: ${message}`);
}

async function readGreeting(): Promise<Uint8Array> {
  if (Deno.stdin.isTerminal()) {
    const keys = Deno.build.os === "windows" ? "Ctrl-Z and Enter" : "Ctrl-D";
    log.say(`Reading the greeting from the terminal; end it with ${keys}`);
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
    function stop() {
      resolve();
      setTimeout(() => {
        for (const signal of signals) Deno.removeSignalListener(signal, stop);
      }, 500);
    }
    for (const signal of signals) Deno.addSignalListener(signal, stop);
  });
}

async function main() {
  const { help, version, verbose, ...options } = await parseFlags(Deno.args)
    .catch((error) =>
      error instanceof TypeError
        ? cannot("load @std/cli/parse-args")(error)
        : exit(2, `${error.message} (see --help)`)
    );
  if (help || version) {
    const output = help ? HELP : `@greeting/server ${VERSION}\n`;
    return await writeAll(Deno.stdout, output)
      .catch(cannot("write to standard output"));
  }
  const greeting = options.greeting === "-"
    ? await readGreeting().catch(cannot("read standard input"))
    : options.greeting;

  let greeted = 0;
  let failed = 0;
  let complained = -Infinity;
  // Promise.try() hands what serve() throws to catch().
  const server = await Promise.try(serve, {
    ...options,
    greeting,
    onOutcome(outcome) {
      if (outcome.error) failed++;
      else greeted++;
      if (verbose) log.say(lineFor(outcome));
    },
    onAcceptError(error) {
      // One line a second is enough: accept() is tried many times a second.
      if (performance.now() - complained < 1000) return;
      complained = performance.now();
      log.say(`Cannot accept, trying again: ${error.message}`);
    },
  }).catch(cannot(`listen on ${hostPort(options)}`));

  const stopped = stopSignal(); // before "Listening" is printed
  // An address such as fe80::1%eth0 names its network interface after the %. Deno
  // does not show that part, but a client needs it.
  const zone = /%[^\]]*/.exec(options.hostname)?.[0] ?? "";
  const addr = { ...server.addr, hostname: server.addr.hostname + zone };
  log.say(`Listening on ${hostPort(addr)} (try: ${clientFor(addr)})`);
  await stopped;

  server.shutdown();
  if (server.connections > 0) {
    log.say(
      `Stopping: waiting for clients (${server.connections} left); a second signal ends it`,
    );
  }
  await server.finished;
  await exit(0, `Stopped: ${greeted} greeted, ${failed} failed`);
}

if (import.meta.main) await main();
