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
 * Or import {@linkcode serve}. Each of these three servers takes one line:
 *
 * ```ts ignore
 * import { serve } from "./server.ts";
 *
 * // Quote of the day (RFC 865), the time (RFC 867), and the client's address.
 * serve({ port: 9017, greeting: "Less is more.\r\n" });
 * serve({ port: 9013, greeting: () => `${new Date()}\r\n` });
 * serve({ port: 9001, greeting: (client) => `${client.hostname}\n` });
 * ```
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
 * await using server = serve({ port: 0, greeting: "Hello\n" });
 * const conn = await Deno.connect({ port: server.addr.port });
 * console.log(await new Response(conn.readable).text());
 * ```
 *
 * @throws {TypeError} An option has the wrong type.
 * @throws {RangeError} A number is out of its range.
 * @throws {Deno.errors.AddrInUse} Another program listens on this address. Other
 * errors of `Deno.listen` are thrown as well, such as
 * `Deno.errors.AddrNotAvailable` and `Deno.errors.PermissionDenied`.
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
    const accepting = this.#accept();
    await this.#stop.promise;
    await this.#greetQueue();
    this.#closeListener();
    await accepting;
    await this.#connections.allEnded();
    this.#settings.signal?.removeEventListener("abort", this.#abort);
  }

  /**
   * Step 5: accept clients until the listener is closed. `#queueWatch` is told
   * when accept() has given a client or an error, and when it is not called.
   */
  async #accept() {
    const { maxConnections, onAcceptError } = this.#settings;
    while (true) {
      try {
        for await (const conn of this.#listener) {
          this.#serve(conn); // not awaited: clients are served side by side
          this.#queueWatch.acceptAnswered(this.#connections.size);
          if (this.#connections.size >= maxConnections) {
            await this.#queueWatch.pauseAccept(this.#connections.nextEnd());
          }
        }
        return;
      } catch (error) {
        // An error of accept() ends the `for await` loop, but the listener still
        // works. So the loop starts again.
        this.#queueWatch.acceptAnswered(this.#connections.size);
        if (clientHasLeft(error)) continue;
        // The process may be out of file descriptors or memory. Meanwhile the
        // client waits in the kernel's queue.
        callBack(onAcceptError, error as Error);
        await this.#queueWatch.pauseAccept(sleep(ACCEPT_RETRY));
      }
    }
  }

  /** Steps 6 and 7: the life of a connection. */
  async #serve(conn: Deno.TcpConn) {
    const { answer, greeting, timeout, signal } = this.#settings;
    const connection = this.#connections.add(conn, timeout);
    try {
      signal?.throwIfAborted(); // the abort came while this was being accepted

      // Step 6: read, then write. Nobody looks at what the client says, so the
      // server reads first only if it is told to let the client speak first.
      if (answer) {
        connection.waitsForClient = true;
        await conn.read(SINK);
        connection.waitsForClient = false;
      }
      const bytes = greeting instanceof Uint8Array
        ? greeting
        : toBytes(await greeting(clientOf(conn)));
      // First writes take turns, see WriteGroups.
      await this.#firstWrites.turn();
      try {
        connection.written = await conn.write(pieceOf(bytes, 0));
      } finally {
        this.#firstWrites.done();
      }
      // A write may take only a part, so the rest of a large greeting follows.
      // The server has to read meanwhile. A client may send all that it has before
      // it reads. If the server did not read, each would wait for the other.
      let drained: Promise<void> | undefined;
      while (connection.written < bytes.length) {
        drained ??= drain(conn);
        connection.written += await conn.write(
          pieceOf(bytes, connection.written),
        );
      }
      // The deadline may have come after the kernel took the greeting and before
      // the server heard of it. Then the client has been reported as failed.
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
   * Step 7: close. Operations of the connection that are still pending reject
   * then. `#serve` catches that and calls this again, which does nothing.
   */
  #close(connection: Connection, reason?: unknown) {
    const { conn, state } = connection;
    if (state === "closed") return;
    connection.state = "closed";
    conn.close();
    this.#connections.remove(connection);
    if (state === "greeting") this.#report(connection, toError(reason));
  }

  /**
   * Step 8: shut down. An arrow function keeps its `this`, so a user can write
   * `const { shutdown } = serve()`.
   */
  readonly shutdown = (): Promise<void> => {
    this.#stop.resolve();
    return this.finished;
  };

  readonly [Symbol.asyncDispose] = this.shutdown;

  /**
   * Clients in the kernel's queue are already connected, so a stop greets them
   * too. But new clients may keep coming, so this ends after the timeout.
   */
  async #greetQueue() {
    const { timeout } = this.#settings;
    const timer = setTimeout(() => this.#closeListener(), timeout);
    await this.#queueWatch.untilEmpty();
    clearTimeout(timer);
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

  /** Closes a connection at its deadline. The error is for clients not greeted. */
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

// ============ The open connections, each with its deadline ============

/** One client, from accept() to close(). */
interface Connection {
  readonly conn: Deno.TcpConn;
  /**
   * `greeting`: the greeting is being made or written. `greeted`: all of it is
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
 * The open connections. One timer, the ticker, counts down the time that each of
 * them has left. It does not look at the clock, which goes on while the process is
 * suspended: clients would be cut off for time in which the server did nothing.
 */
class Connections {
  /** In no order. An array, as adding and removing costs less than in a Set. */
  readonly #open: Connection[] = [];
  /**
   * The length of a tick, in milliseconds. A connection is closed up to a tick
   * after its deadline. So a tick is no more than a quarter of the timeout.
   */
  readonly #tick: number;
  readonly #cutOff: (connection: Connection) => void;
  /** It runs only while there are connections: an idle server uses no CPU. */
  #ticker: ReturnType<typeof setInterval> | undefined;
  #onEnd = () => {};

  constructor(timeout: number, cutOff: (connection: Connection) => void) {
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
      timeLeft: NaN,
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

  /** Cuts the connection off after at least so many milliseconds from now. */
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
   * Resolves when a connection ends. Only one caller can wait at a time: while it
   * runs the accept loop, and then `allEnded()`.
   */
  nextEnd(): Promise<void> {
    return new Promise((resolve) => this.#onEnd = resolve);
  }

  /** Resolves when no connection is left. None may be added after that. */
  async allEnded() {
    while (this.size > 0) await this.nextEnd();
    this.#stopTicker();
    // The pending operations of closed connections reject in the next turn. A
    // test that ended before that would be told that it leaks them.
    await sleep(0);
  }
}

// ================ Reading, writing and waiting for a client ================

/** The most bytes that one write is given. */
const MAX_WRITE = 256 * 1024;

/**
 * The part of a greeting to write next. Windows takes a whole write, however large,
 * if its buffer is not full yet. So it would take all of a large greeting at once,
 * and a client that reads nothing would count as greeted. Of several small writes
 * it takes only those that fill the buffer; the next one waits for the client.
 */
function pieceOf(greeting: Uint8Array, start: number): Uint8Array {
  return greeting.subarray(start, start + MAX_WRITE);
}

/** Receives everything that clients send. Nobody looks at it, so one is enough. */
const SINK = new Uint8Array(256 * 1024);

/**
 * Reads and throws away what the client sends, until it closes its side. If a
 * client sends without end, data is always there, and the loop would never let
 * others have a turn but for the `sleep(0)`. Without it four such clients delayed
 * all others by 250 ms.
 */
async function drain(conn: Deno.TcpConn) {
  try {
    while (await conn.read(SINK) !== null) await sleep(0);
  } catch {
    // The client has reset the connection, or it was closed here.
  }
}

/** How long a greeted client may take to close its side, in milliseconds. */
const LINGER = 1000;
/**
 * Above this many bytes, the client may need longer to read the greeting. A link
 * of 0.5 Mbit/s carries as much in a second.
 */
const LARGE_GREETING = 64 * 1024;

/**
 * How long a greeted client has to close its side before the server closes the
 * connection. In a shorter time, clients that still send would be reset. In a
 * longer one, clients that never close could fill all of `maxConnections`.
 *
 * But the kernel takes up to 4 MB at once, so a client on a slow link may still be
 * reading a large greeting long after it counts as greeted. If it sends something
 * after the server has closed, a reset destroys the rest. So the client of a large
 * greeting has the whole timeout.
 */
function lingerTime(greeting: Uint8Array, timeout: number): number {
  if (greeting.length > LARGE_GREETING) return timeout;
  return Math.min(timeout, LINGER);
}

/** The pause after a failed accept(), in milliseconds. */
const ACCEPT_RETRY = 10;

/** Whether accept() failed because the client has already left. */
function clientHasLeft(error: unknown): boolean {
  return error instanceof Deno.errors.NotConnected ||
    error instanceof Deno.errors.ConnectionAborted ||
    error instanceof Deno.errors.ConnectionReset || // on Windows
    // On macOS: accept() asks for the client's address, and getpeername() fails
    // with EINVAL, for which Deno throws a TypeError.
    error instanceof TypeError;
}

// ==================== First writes: fair to thousands ====================

/**
 * Lets first writes go in groups. While one group is being written, connections
 * that become ready wait for the next group, which starts as a whole.
 *
 * Deno's runtime (tokio) completes at most 128 operations in a turn of its loop.
 * The other writes are tried again in the next turn, but behind the writes that
 * have begun since. While new clients keep coming, the same writes can be overtaken
 * again and again: some of 4,000 clients that came at once waited for more than a
 * second. In groups they wait about equally long, because no newer write begins
 * before all writes of the group are done.
 *
 * To accept fewer clients at a time would not help: then the kernel's queue
 * overflows and clients are lost.
 *
 * A group is short. A first write goes into an empty buffer, so it does not wait
 * for its client; if the kernel is out of memory, the deadlines end it.
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
 * Finds out when accept() has handed over all clients of the kernel's queue.
 *
 * No call tells the length of the queue. While accept() gives clients, there may
 * be more; when it gives no more, the queue is empty. But a client can come late:
 * accept() waits behind up to three operations of every open connection (write,
 * half-close, read), and the runtime completes 128 operations in a turn of the
 * event loop. That is a turn for every 43 connections. So the queue counts as empty
 * after 4 turns without a client, plus one for every 25 connections, which leaves
 * a margin. With 3 turns in all, half of all stops lost 128 clients of 4,000.
 */
class QueueWatch {
  /** In how many turns of the event loop accept() may still give a client. */
  #turnsLeft = 4;
  /** Resolves when accept() is called again. */
  #pause: Promise<void> | undefined;

  /**
   * accept() has given a client or an error, while `open` connections were open.
   * This number counts, even if some of them are closed before the next client:
   * the operations that delay accept() have already begun.
   */
  acceptAnswered(open: number) {
    this.#turnsLeft = 4 + open / 25;
  }

  /** Waits. Meanwhile accept() is not called, so turns do not count. */
  pauseAccept(until: Promise<void>): Promise<void> {
    this.#pause = until;
    return until;
  }

  /** Resolves when the queue is empty, or soon after `giveUp()`. */
  async untilEmpty() {
    while (this.#turnsLeft > 0) {
      await this.#pause;
      this.#turnsLeft--;
      await sleep(0); // lasts one turn
    }
  }

  /**
   * The listener is closed, so accept() gives no more clients. A pause need not be
   * broken off: it ends after 10 ms, or when the next connection ends.
   */
  giveUp() {
    this.#turnsLeft = 0;
  }
}

// ============================== Small helpers ==============================

/**
 * The runtime's own timers, kept since this module was loaded. If a test fakes the
 * timers later (FakeTime, sinon), the server still works.
 */
const { setTimeout, clearTimeout, setInterval, clearInterval, queueMicrotask } =
  globalThis;

function sleep(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

/**
 * Calls a callback of the user soon, when the server's own code has returned. So an
 * error of the callback is an uncaught error, and does not break off the server's
 * code. And the callback may call `shutdown()` or abort the signal.
 */
function callBack<T>(callback: ((value: T) => void) | undefined, value: T) {
  if (callback) queueMicrotask(() => callback(value));
}

/** The client's address. An IPv4 client of an IPv6 socket is shown as IPv4. */
function clientOf({ remoteAddr }: Deno.TcpConn): Deno.NetAddr {
  if (!remoteAddr.hostname.startsWith("::ffff:")) return remoteAddr;
  return { ...remoteAddr, hostname: remoteAddr.hostname.slice(7) };
}

/** Anything can be thrown, and be the reason of an abort. */
function toError(reason: unknown): Error {
  if (reason instanceof Error) return reason;
  return new Error(`not an Error: ${Deno.inspect(reason)}`, { cause: reason });
}

/** Makes a copy, so that later changes of the original have no effect. */
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
   * only the connection of that client fails.
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
   * down to its own maximum: on Linux `net.core.somaxconn`, on macOS 128, on
   * Windows about 200.
   *
   * @default {65535}
   */
  tcpBacklog?: number | undefined;
  /**
   * How long a client may take for its greeting, in milliseconds. A client that
   * takes longer is cut off. The command line takes this in seconds.
   *
   * Afterwards a greeted client has a second, or `timeout` if that is less, to
   * close its side. After a greeting of more than 64 KiB it has the whole
   * `timeout`, as it may still be reading.
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
   * descriptors. The server tries again every 10 ms. An error thrown here is an
   * uncaught error, which by default ends the process.
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
   * the read or write. If a reason or what was thrown is no Error, it is the
   * `cause` of an Error whose message contains it.
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
   * can accept in that time, because few places or file descriptors are free or
   * because new clients keep coming, the rest of the queue is reset.
   */
  shutdown(): Promise<void>;
}

/**
 * The values of options that are left out.
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

function checkOptions(options: ServeOptions) {
  const { greeting = DEFAULTS.greeting } = options;
  function number(name: keyof typeof RANGES): number {
    // Only undefined stands for the default; null is an error.
    const { [name]: value = DEFAULTS[name] } = options;
    return checkNumber(name, value, RANGES[name]);
  }
  return {
    hostname: options.hostname ?? DEFAULTS.hostname,
    port: number("port"),
    // A fixed greeting is encoded once, not for every client.
    greeting: typeof greeting === "function" ? greeting : toBytes(greeting),
    tcpBacklog: number("tcpBacklog"),
    timeout: number("timeout"),
    maxConnections: number("maxConnections"),
    reusePort: options.reusePort ?? DEFAULTS.reusePort,
    answer: options.answer ?? DEFAULTS.answer,
    signal: options.signal,
    onOutcome: options.onOutcome,
    onAcceptError: options.onAcceptError,
  };
}

/** Which numbers are allowed. */
interface Range {
  readonly kind: "number" | "whole number";
  readonly min: number;
  readonly max: number;
}

/** The largest number that listen(2) and setTimeout() take. */
const MAX_INT32 = 2 ** 31 - 1;
const COUNT: Range = { kind: "whole number", min: 1, max: MAX_INT32 };
const RANGES = {
  port: { kind: "whole number", min: 0, max: 65535 } as Range,
  tcpBacklog: COUNT,
  timeout: COUNT,
  maxConnections: COUNT,
};

/**
 * Checks a number of an option or a flag. Without this, Deno and the kernel would
 * silently use another number. `given` is what the user wrote.
 */
function checkNumber(
  name: string,
  value: unknown,
  { kind, min, max }: Range,
  given = value,
): number {
  const rule = `${name} must be a ${kind} from ${min} to ${max}`;
  const message = `${rule}, not ${Deno.inspect(given)}`;
  if (typeof value !== "number") throw new TypeError(message);
  const isOfKind = kind === "number" || Number.isInteger(value);
  if (isOfKind && value >= min && value <= max) return value;
  throw new RangeError(message);
}

// ============================= The command line =============================

/** As in `deno.json`, which a copy of this file alone does not have. */
const VERSION = "1.0.0";

const HELP = `Writes a greeting to every TCP client and closes the connection.

Usage: deno run --allow-net server.ts [options]

  -p, --port <port>          TCP port, 0 for any free one (${DEFAULTS.port})
  -H, --hostname <host>      address to listen on (${DEFAULTS.hostname}); :: is
                             IPv6 and, except on Windows, IPv4
  -g, --greeting <text>      what every client is sent; a newline is added if
                             it has none (${DEFAULTS.greeting.trimEnd()});
                             --greeting=- sends standard input, byte for byte
  -b, --backlog <n>          connections that the kernel queues for accept();
                             it cuts this down to its maximum (${DEFAULTS.tcpBacklog})
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

/**
 * Parses a command line. A greeting of `-` stands for standard input. It is
 * exported for the tests.
 *
 * @throws {Error} There is an unknown flag, a stray word, or a bad or missing
 * value. The message is one line.
 * @ignore
 */
export async function parseFlags(args: string[]): Promise<
  typeof DEFAULTS & { verbose: boolean; help: boolean; version: boolean }
> {
  // Loaded here, so that the module works where this package is not installed.
  const { parseArgs } = await import("@std/cli/parse-args");
  // parseArgs() takes -gno=yes for `-g yes`.
  const unknown = args.filter((arg) => /^-[^-=][^=]+=/.test(arg));
  const { _: words, ...values }: Values = parseArgs(args, {
    // deno-fmt-ignore
    alias: { p: "port", H: "hostname", g: "greeting", b: "backlog", t: "timeout",
      c: "max-connections", r: "reuse-port", a: "answer", v: "verbose", h: "help",
      V: "version" },
    // The others take no value. They are not declared as `boolean`, because then
    // parseArgs() would take --verbose=no for true.
    // deno-fmt-ignore
    string: ["port", "hostname", "greeting", "backlog", "timeout", "max-connections"],
    unknown: (arg: string) => {
      unknown.push(arg);
      return false;
    },
  });
  unknown.push(...words as string[]); // the words after --

  const greeting = text(values, "greeting", DEFAULTS.greeting);
  const needsNewline = greeting !== "-" && !greeting.endsWith("\n");
  const maxSeconds = Math.floor(MAX_INT32 / 1000);
  const seconds: Range = { kind: "number", min: 0.001, max: maxSeconds };
  const { port, tcpBacklog, timeout, maxConnections } = DEFAULTS;
  const flags = {
    hostname: text(values, "hostname", DEFAULTS.hostname),
    port: number(values, "port", port, RANGES.port),
    greeting: needsNewline ? greeting + "\n" : greeting,
    tcpBacklog: number(values, "backlog", tcpBacklog, COUNT),
    timeout: Math.round(
      1000 * number(values, "timeout", timeout / 1000, seconds),
    ),
    maxConnections: number(values, "max-connections", maxConnections, COUNT),
    reusePort: isOn(values, "reuse-port"),
    answer: isOn(values, "answer"),
    verbose: isOn(values, "verbose"),
    help: isOn(values, "help"),
    version: isOn(values, "version"),
  };
  const [arg] = unknown;
  if (arg === undefined) return flags;
  const kind = /^-./.test(arg) ? "unknown flag" : "stray word";
  throw new Error(`${kind} ${JSON.stringify(arg)}`);
}

/** What parseArgs() finds. */
type Values = Record<string, unknown>;

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

function number(values: Values, flag: string, otherwise: number, range: Range) {
  const value = text(values, flag, `${otherwise}`);
  // Number() alone would also take " 80", 0x50 and 1e3.
  const form = range.kind === "number" ? /^\d*\.?\d+$/ : /^\d+$/;
  const parsed = form.test(value) ? Number(value) : NaN;
  return checkNumber(`--${flag}`, parsed, range, value);
}

/** `host:port`, with brackets around an IPv6 address. */
function hostPort({ hostname, port }: { hostname: string; port: number }) {
  return `${hostname.includes(":") ? `[${hostname}]` : hostname}:${port}`;
}

/** A client's command that works on this machine. */
function clientFor({ hostname, port }: Deno.NetAddr): string {
  // Not `localhost`, for which some clients try ::1 alone.
  const any: Record<string, string> = { "0.0.0.0": "127.0.0.1", "::": "::1" };
  return `nc ${any[hostname] ?? hostname} ${port}`;
}

function lineFor({ remoteAddr, bytes, milliseconds, error }: Outcome): string {
  const how = error ? `failed, ${error.message}` : "greeted";
  const figures = `${bytes} bytes, ${milliseconds.toFixed(1)} ms`;
  return `${hostPort(remoteAddr)} ${how}: ${figures}`;
}

/**
 * Prints lines to standard error, without waiting for it: a reader that stalls
 * delays neither a greeting nor a stop.
 */
class Log {
  /** The most that is kept for a slow reader. Later lines are dropped. */
  static readonly #LIMIT = 1 << 20;
  #waiting = "";
  #writer: Promise<void> | undefined;

  say(line: string) {
    if (this.#waiting.length + line.length > Log.#LIMIT) return;
    this.#waiting += line.replace(/\s+/g, " ") + "\n";
    this.#writer ??= this.#write();
  }

  async #write() {
    while (this.#waiting !== "") {
      const lines = this.#waiting;
      this.#waiting = "";
      // An error of standard error cannot be told anywhere.
      await write(Deno.stderr, lines).catch(() => {});
    }
    this.#writer = undefined;
  }

  /** Waits until all is written, but half a second at the most. */
  async flush() {
    await Promise.race([this.#writer, sleep(500)]);
  }
}

const log = new Log();

async function write(stream: typeof Deno.stderr, text: string) {
  const bytes = new TextEncoder().encode(text);
  for (let written = 0; written < bytes.length;) {
    try {
      written += await stream.write(bytes.subarray(written));
    } catch (error) {
      // The pipe is full. Elsewhere a write would wait, but another process that
      // writes to the same pipe has made it non-blocking.
      if (!(error instanceof Deno.errors.WouldBlock)) throw error;
      await sleep(10);
    }
  }
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

/** Greets clients until a signal comes. */
async function greetUntilSignal(options: ServeOptions, verbose: boolean) {
  let greeted = 0;
  let failed = 0;
  let complained = -Infinity;
  const server = serve({
    ...options,
    onOutcome(outcome) {
      if (outcome.error) failed++;
      else greeted++;
      if (verbose) log.say(lineFor(outcome));
    },
    onAcceptError(error) {
      // One line a second is enough: accept() is tried every 10 ms.
      if (performance.now() - complained < 1000) return;
      complained = performance.now();
      log.say(`Cannot accept, trying again: ${error.message}`);
    },
  });
  const signal = stopSignal();
  // Deno's address lacks the zone of a link-local address, as in fe80::1%eth0.
  const zone = /%.*$/.exec(options.hostname ?? "")?.[0] ?? "";
  const addr = { ...server.addr, hostname: server.addr.hostname + zone };
  log.say(`Listening on ${hostPort(addr)} (try: ${clientFor(addr)})`);
  await signal;
  server.shutdown();
  if (server.connections > 0) {
    log.say(
      `Stopping: waiting for clients (${server.connections} left); a second signal ends it`,
    );
  }
  await server.finished;
  log.say(`Stopped: ${greeted} greeted, ${failed} failed`);
}

/** Makes a handler for `catch()` that says what could not be done. */
function cannot(task: string) {
  return ({ message }: Error): never => {
    throw new Error(`Cannot ${task}: ${message}`);
  };
}

async function run(flags: Awaited<ReturnType<typeof parseFlags>>) {
  const { help, version, verbose, ...options } = flags;
  if (help || version) {
    const output = help ? HELP : `@greeting/server ${VERSION}\n`;
    return await write(Deno.stdout, output)
      .catch(cannot("write to standard output"));
  }
  const greeting = options.greeting === "-"
    ? await readGreeting().catch(cannot("read standard input"))
    : options.greeting;
  // Nothing but Deno.listen() fails in it.
  await greetUntilSignal({ ...options, greeting }, verbose)
    .catch(cannot(`listen on ${hostPort(options)}`));
}

/** Runs the command line and returns the exit code. */
async function main(args: string[]): Promise<number> {
  function fail(exitCode: number, line: string) {
    log.say(line);
    return exitCode;
  }
  // parseFlags() loads this, too. Here it is tried first, because its failure is
  // not a mistake in the flags: the exit code is 1, not 2.
  try {
    await import("@std/cli/parse-args");
  } catch (error) {
    const { message } = error as Error;
    return fail(1, `Cannot load @std/cli/parse-args: ${message}`);
  }
  let flags;
  try {
    flags = await parseFlags(args);
  } catch (error) {
    return fail(2, `${(error as Error).message} (see --help)`);
  }
  try {
    await run(flags);
    return 0;
  } catch (error) {
    return fail(1, (error as Error).message);
  }
}

if (import.meta.main) {
  const exitCode = await main(Deno.args);
  await log.flush();
  Deno.exit(exitCode);
}
