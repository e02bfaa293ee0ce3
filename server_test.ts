/**
 * Tests and benchmarks of the greeting server.
 *
 * `deno test --allow-net` tests the module with real sockets. If `--allow-run` is
 * granted too, the command line is tested as its user sees it: as a process, with
 * nc as its client, with signals, limits and exit codes.
 */

import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertInstanceOf,
  assertLess,
  assertMatch,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { concat, equals, startsWith } from "@std/bytes";
import { Buffer } from "node:buffer";
import * as http from "node:http";
import { Socket } from "node:net";
import { setImmediate } from "node:timers/promises";
import config from "./deno.json" with { type: "json" };
import readme from "./README.md" with { type: "text" };
import {
  type Greeting,
  type GreetingServer,
  type Outcome,
  parseFlags,
  serve,
  type ServeOptions,
} from "./server.ts";

// The first test needs no helper. The others are shorter with those below it.
test("serve() greets a client and closes the connection", async () => {
  const server = serve({ hostname: "127.0.0.1", port: 0 });
  const { hostname, port } = server.addr;
  const conn = await Deno.connect({ hostname, port });
  const text = await new Response(conn.readable).text();
  assertEquals(text, "Hello from server\n");
  await server.shutdown();
});

// =========================== Helpers of most tests ===========================

const GREETING = "Hello from server\n";
/**
 * 20 MiB, in which no two parts are alike. The kernel's buffers hold less, so the
 * server can write the rest only while the client reads.
 */
const LARGE = new Uint8Array(
  new Uint32Array(5 << 20).map((_, i) => i).buffer,
);

/**
 * A test that fails if it takes a minute, or at the first uncaught error. Deno
 * alone would end the whole run at such an error, without the test's name.
 */
function test(name: string, fn: () => Promise<void>, ignore = false): void {
  async function run() {
    const uncaught = Promise.withResolvers<never>();
    using _ = onUncaughtError(uncaught.reject);
    await Promise.race([fn(), uncaught.promise]);
  }
  Deno.test({ name, fn: run, ignore, timeout: 60_000 });
}

/** Calls a function with every uncaught error, in the place of Deno. */
function onUncaughtError(handle: (error: Error) => void): Disposable {
  function listen(event: ErrorEvent | PromiseRejectionEvent) {
    event.preventDefault();
    handle(event instanceof ErrorEvent ? event.error : event.reason);
  }
  addEventListener("error", listen);
  addEventListener("unhandledrejection", listen);
  return {
    [Symbol.dispose]() {
      removeEventListener("error", listen);
      removeEventListener("unhandledrejection", listen);
    },
  };
}

/** What most tests need of a server. */
interface Server {
  readonly addr: Deno.NetAddr;
  readonly finished: Promise<unknown>;
  shutdown(): Promise<unknown>;
}

/** A server on a free port of 127.0.0.1 that notes how its clients fared. */
function start(options: ServeOptions = {}) {
  const outcomes: Outcome[] = [];
  const server = serve({
    hostname: "127.0.0.1",
    port: 0,
    onOutcome: (outcome) => void outcomes.push(outcome),
    ...options,
  });
  const errors = () => outcomes.map(({ error }) => error);
  return { server, outcomes, errors };
}

function connect({ addr: { port } }: Server): Promise<Deno.TcpConn> {
  return Deno.connect({ hostname: "127.0.0.1", port });
}

/** Connects, reads the greeting, and keeps the connection open. */
async function connectAndStay(server: GreetingServer): Promise<Deno.TcpConn> {
  const conn = await connect(server);
  assertEquals(await conn.read(new Uint8Array(100)), GREETING.length);
  return conn;
}

/** Calls a function so many times at once. */
function times<T>(count: number, fn: (i: number) => Promise<T>): Promise<T[]> {
  return Promise.all(Array.from({ length: count }, (_, i) => fn(i)));
}

/** The same, 50 at once: the queues of macOS and Windows hold little more. */
async function inTurn<T>(count: number, fn: () => Promise<T>): Promise<T[]> {
  const results: T[] = [];
  while (results.length < count) {
    results.push(...await times(Math.min(50, count - results.length), fn));
  }
  return results;
}

/** Reads to the end, and closes. Rejects if the connection is reset. */
function receive(conn: Deno.Conn): Promise<Uint8Array> {
  return new Response(conn.readable).bytes();
}

function decode(bytes: Uint8Array): string {
  return new TextDecoder().decode(bytes);
}

async function receiveText(conn: Deno.Conn): Promise<string> {
  return decode(await receive(conn));
}

async function assertAllGreeted(conns: Deno.Conn[]): Promise<void> {
  const texts = await Promise.all(conns.map(receiveText));
  assertEquals(texts, Array(conns.length).fill(GREETING));
}

async function assertGreets(server: Server): Promise<void> {
  await assertAllGreeted([await connect(server)]);
}

async function assertRefuses(server: Server): Promise<void> {
  await assertRejects(() => connect(server), Deno.errors.ConnectionRefused);
}

async function send(conn: Deno.Conn, size: number): Promise<void> {
  const data = new Uint8Array(size);
  for (let sent = 0; sent < size;) {
    sent += await conn.write(data.subarray(sent));
  }
}

function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** Waits until a condition holds. */
async function until(condition: () => unknown): Promise<void> {
  while (!condition()) await sleep(1);
}

/**
 * Waits for a promise, and fails if a timer that is started now comes first. The
 * timer runs in the same event loop, so a slow machine delays both.
 */
async function within<T>(milliseconds: number, promise: Promise<T>) {
  let late = false;
  const timer = setTimeout(() => late = true, milliseconds);
  const value = await promise;
  clearTimeout(timer);
  assertEquals(late, false, `it took more than ${milliseconds} ms`);
  return value;
}

const isLinux = Deno.build.os === "linux";
/** What tests with processes need: Linux, sh, nc, script, ss, setpriv, /proc. */
const hasProcesses = isLinux &&
  Deno.permissions.querySync({ name: "run" }).state === "granted";

const SERVER = `${import.meta.dirname}/server.ts`;

/** A command that runs a program, and that the kernel kills when the tests end. */
function denoRun(permissions: string[] = ["--allow-net"], program = SERVER) {
  const deno = [Deno.execPath(), "run", "--no-prompt", ...permissions, program];
  return ["setpriv", "--pdeathsig=KILL", ...deno];
}

/** The lines of a stream, as they come. */
function watch(stream: ReadableStream<Uint8Array>) {
  let text = "";
  let over = false;
  const end = (async () => {
    for await (const piece of stream.pipeThrough(new TextDecoderStream())) {
      text += piece;
    }
    over = true;
  })();
  const lines = () => text.split(/\r?\n/).slice(0, -1);
  /** Waits for a line. */
  async function line(pattern: RegExp): Promise<RegExpExecArray> {
    const found = () =>
      lines().map((line) => pattern.exec(line)).find((match) => match);
    await until(() => found() || over);
    const match = found();
    if (!match) throw new Error(`no line ${pattern}: ${text}`);
    return match;
  }
  return { end, lines, line };
}

// ============ What the plain loop loses, and serve() does not ============

// Each test is a row of the README's table. The README's plain loop and serve() meet
// the same clients, and the test shows what happens to both.

/** A server as a tutorial writes it: steps 5 to 7, for a given listener. */
type Loop = (
  greeting: Uint8Array,
  listener: Deno.TcpListener,
) => Promise<void>;

/** The plain loop as it stands in the README, and its code with the listener. */
const [plainLoop, plainProgram] = await (async () => {
  const [, program] = /^```ts ignore\n([^]*?)^```/m.exec(readme)!;
  const constants = /^const (greeting|listener) = .*\n/gm;
  assertEquals(program!.match(constants)?.length, 2);
  const code = "export async function plainLoop(greeting: Uint8Array, " +
    `listener: Deno.TcpListener) {${program!.replace(constants, "")}}`;
  const module = await import(
    `data:application/typescript,${encodeURIComponent(code)}`
  );
  return [module.plainLoop as Loop, program!];
})();

/** Starts a loop. When it ends, so does the program: its listener is closed. */
function startLoop(loop: Loop, greeting?: Greeting): Server {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const close = () => listener[Symbol.dispose]();
  const bytes = new Uint8Array(Buffer.from(greeting ?? GREETING));
  const finished = loop(bytes, listener).catch((error) => error).finally(close);
  return {
    addr: listener.addr,
    finished,
    async shutdown() {
      close();
      await finished;
    },
  };
}

/** What clients see of the plain loop, and what the same clients see of serve(). */
async function bothSee<T>(
  clients: (server: Server) => Promise<T>,
  greeting?: Greeting,
): Promise<[plain: T, served: T]> {
  const results: T[] = [];
  for (
    const server of [startLoop(plainLoop, greeting), start({ greeting }).server]
  ) {
    results.push(await clients(server));
    await server.shutdown();
  }
  return results as [T, T];
}

/** Connects and resets the connection, after `bytes` bytes have come. */
async function connectAndReset(port: number, bytes = 0): Promise<void> {
  const socket = new Socket();
  await new Promise<void>((resolve, reject) => {
    const reset = () => {
      if (socket.bytesRead >= bytes) socket.resetAndDestroy();
    };
    socket.once("connect", reset);
    socket.on("data", reset);
    socket.once("close", () => resolve());
    socket.once("error", reject);
    socket.connect(port, "127.0.0.1");
  });
}

/** Runs a program in a thread of its own. */
function startThread(program: string) {
  const url = `data:application/javascript,${encodeURIComponent(program)}`;
  const worker = new Worker(url, { type: "module" });
  const message = () =>
    new Promise<MessageEvent>((resolve) => worker.onmessage = resolve);
  return {
    post: (data: unknown) => worker.postMessage(data),
    /** Waits for its next message. */
    message: async <T>() => (await message()).data as T,
    end: () => worker.terminate(),
  };
}

/** The program of `clientsOfBlocked()`. */
function clientThread() {
  const thread = self as unknown as Worker;
  thread.onmessage = async ({ data: { port, resets, count, done } }) => {
    for (let i = 0; i < resets; i++) await connectAndReset(port);
    const conns: Deno.Conn[] = [];
    while (conns.length < count) {
      const conn = await Deno.connect({ hostname: "127.0.0.1", port });
      await conn.write(new Uint8Array(1));
      conns.push(conn);
    }
    Atomics.store(done, 0, 1);
    Atomics.notify(done, 0);
    const texts = conns.map(async (conn) => {
      let text = "";
      const decoder = new TextDecoderStream();
      try {
        for await (const piece of conn.readable.pipeThrough(decoder)) {
          text += piece;
        }
        return text;
      } catch (error) {
        return text + (error as Error).name;
      }
    });
    thread.postMessage(await Promise.all(texts));
  };
}

/**
 * Runs clients in a thread of their own while this thread, and so the server, is
 * blocked. Some reset their connections. Then `count` connect, each sends a byte, and
 * `afterwards` is called. Resolves with what these read, and the name of an error.
 */
async function clientsOfBlocked(
  server: Server,
  { resets = 0, count = 100, afterwards = (): unknown => undefined } = {},
): Promise<string[]> {
  const thread = startThread(`import { Socket } from "node:net";
    ${connectAndReset} (${clientThread})();`);
  const done = new Int32Array(new SharedArrayBuffer(4));
  thread.post({ port: server.addr.port, resets, count, done });
  Atomics.wait(done, 0, 0);
  afterwards();
  const seen = await thread.message<string[]>();
  thread.end();
  return seen;
}

test("the plain loop cuts a large greeting if the client reads late, serve() does not", async () => {
  const [plain, served] = await bothSee(async (server) => {
    const late = await connect(server);
    const next = await connect(server);
    await next.read(new Uint8Array(1)); // the server has written to both now
    next.close();
    return (await receive(late)).length;
  }, LARGE);
  assertLess(plain, LARGE.length);
  assertEquals(served, LARGE.length);
});

test(
  "the plain loop cuts a greeting of 1 MB if the client has sent something, serve() does not",
  async () => {
    const greeting = "x".repeat(1_000_000);
    const [plain, served] = await bothSee(
      (server) => clientsOfBlocked(server, { count: 1 }),
      greeting,
    );
    assertLess(plain[0]!.length, greeting.length); // it ends with an error
    assertEquals(served, [greeting]);
  },
  !isLinux, // elsewhere the client may see no error, or all may be lost
);

test(
  "the plain loop ends when clients reset in the queue, serve() greets those behind them",
  async () => {
    let error: unknown;
    const [plain, served] = await bothSee(async (server) => {
      server.finished.then((value) => error ??= value);
      return await clientsOfBlocked(server, { resets: 5 });
    });
    assertInstanceOf(error, Deno.errors.NotConnected);
    assertEquals(plain, Array(100).fill("ConnectionReset"));
    assertEquals(served, Array(100).fill(GREETING));
  },
  !isLinux, // other systems give accept() the error, or a client that works
);

test("the plain loop resets the clients in the queue at a stop, serve() greets them", async () => {
  const [plain, served] = await bothSee((server) =>
    clientsOfBlocked(server, { afterwards: () => server.shutdown() })
  );
  assertEquals(plain, Array(100).fill("ConnectionReset"));
  assertEquals(served, Array(100).fill(GREETING));
});

test(
  "the plain loop ends without free file descriptors, serve() goes on",
  async () => {
    const announced = "port: 0 });\nconsole.log(listener.addr.port);\n";
    const served = `import { serve } from "${SERVER}";
      console.log(serve({ port: 0 }).addr.port);`;
    const programs = [
      plainProgram.replace(/port: 9000.*\n/, announced),
      served,
    ];
    const greeted = await Promise.all(programs.map(async (program) => {
      const child = new Deno.Command("sh", {
        args: [
          "-c",
          'ulimit -n 64; exec "$@"',
          "sh",
          ...denoRun(["--allow-net"], "-"),
        ],
        stdin: "piped",
        stdout: "piped",
        stderr: "null",
      }).spawn();
      const input = new Blob([program]).stream();
      await input.pipeTo(child.stdin);
      const output = watch(child.stdout);
      const [port] = await output.line(/\d+/);
      child.kill("SIGSTOP"); // so that all of them come at once
      const connect = () => Deno.connect({ port: Number(port) });
      const conns = await times(100, connect);
      child.kill("SIGCONT");
      const texts = await Promise.allSettled(conns.map(receiveText));
      if (program === served) child.kill(); // the other one ends by itself
      const { code } = await child.status;
      await output.end;
      const count = texts.filter((text) =>
        text.status === "fulfilled" && text.value === GREETING
      );
      return { code, greeted: count.length };
    }));
    assertEquals(greeted[0]!.code, 1);
    assertLess(greeted[0]!.greeted, 100);
    assertEquals(greeted[1], { code: 143, greeted: 100 });
  },
  !hasProcesses,
);

/**
 * Clients come, `atOnce` at the same time, until `total` have been greeted. Returns
 * their numbers, which count them as they come, in the order of their greetings.
 */
async function load(server: Server, atOnce: number, total: number) {
  let come = 0;
  const greeted: number[] = [];
  let connecting = 0;
  const waiting: (() => void)[] = [];
  await times(atOnce, async () => {
    const buffer = new Uint8Array(100);
    while (come < total) {
      // No more connect at the same time than the shortest queue holds, see inTurn().
      if (connecting < 50) connecting++;
      else await new Promise<void>((go) => waiting.push(go));
      const number = come++;
      using conn = await connect(server);
      const next = waiting.shift();
      if (next) next();
      else connecting--;
      let bytes = 0;
      for (let n; (n = await conn.read(buffer)) !== null;) bytes += n;
      assertEquals(bytes, GREETING.length);
      greeted.push(number);
    }
  });
  return greeted;
}

test("the plain loop greets thousands before one that came earlier, serve() does not", async () => {
  const [plain, served] = await bothSee(async (server) => {
    const greeted = await load(server, 1000, 4000);
    // Of those that came later than a client, how many were greeted before it?
    const overtaken = greeted.map((number, i) =>
      greeted.slice(0, i).filter((other) => other > number).length
    );
    return Math.max(...overtaken);
  });
  assertGreater(plain, 2000);
  assertLess(served, 1000); // no more than come at once
});

// ====================== serve(): what a client is sent ======================

/** What greeting functions throw, and the reason of aborts. */
const REASON = new Error("enough");
const NEVER = new Promise<never>(() => {});

test("serve() tells the greeting function the client's address, and reports it with the bytes and the time", async () => {
  const { server, outcomes } = start({
    async greeting({ hostname, port }) { // takes 20 ms
      const began = performance.now();
      while (performance.now() < began + 20) await sleep(1);
      return `${hostname} ${port}`;
    },
  });
  const began = performance.now();
  const conn = await connect(server);
  const text = await receiveText(conn);
  const took = performance.now() - began;
  const remoteAddr = conn.localAddr as Deno.NetAddr;
  assertEquals(text, `${remoteAddr.hostname} ${remoteAddr.port}`);
  await server.shutdown();
  assertEquals(outcomes.length, 1);
  const { milliseconds, ...others } = outcomes[0]!;
  const bytes = text.length;
  assertEquals(others, { remoteAddr, bytes, error: undefined });
  assertGreaterOrEqual(milliseconds, 20);
  assertLess(milliseconds, took);
});

test("serve() sends bytes as they are, text as UTF-8, and nothing else", async () => {
  const bytes = Uint8Array.from({ length: 256 }, (_, i) => i);
  for (
    const greeting of [bytes, "grüß dich ☎", "\r\n\r\n", "", new Uint8Array()]
  ) {
    await using server = start({ greeting }).server;
    const expected = typeof greeting === "string"
      ? new TextEncoder().encode(greeting)
      : greeting;
    assertEquals(await receive(await connect(server)), expected);
  }
});

test("serve() sends a large greeting whole to fast and slow readers, past many that read nothing", async () => {
  const { server, outcomes } = start({ greeting: LARGE, timeout: 60_000 });
  const many = isLinux ? 200 : 20; // each takes up to a megabyte of the kernel
  const stuck = await inTurn(many, () => connect(server));
  async function receiveSlowly(conn: Deno.Conn) {
    const chunks: Uint8Array[] = [];
    for await (const chunk of conn.readable) {
      chunks.push(chunk);
      if (chunks.length % 8 === 0) await sleep(1);
    }
    return concat(chunks);
  }
  const slow = receiveSlowly(await connect(server));
  const fast = await receive(await connect(server));
  assertGreaterOrEqual(server.connections, many);
  assert(equals(fast, LARGE));
  assert(equals(await slow, LARGE));
  stuck.forEach((conn) => conn.close());
  await server.shutdown();
  const whole = outcomes.filter(({ error }) => !error);
  assertEquals(whole.map(({ bytes }) => bytes), [LARGE.length, LARGE.length]);
});

test("serve() copies greetings, so that later changes do not reach a client", async () => {
  const original = new TextEncoder().encode(GREETING);
  const buffer = Buffer.from(GREETING); // whose slice() copies nothing
  const servers = [original, buffer].map((greeting) =>
    start({ greeting }).server
  );
  original.fill(0);
  structuredClone(original, { transfer: [original.buffer] }); // detaches it
  buffer.fill(0);
  for (const server of servers) {
    await assertGreets(server);
    await server.shutdown();
  }
  // The same holds for what a greeting function returns.
  const reused = new Uint8Array(LARGE.length);
  let calls = 0;
  await using server = start({ greeting: () => reused.fill(++calls) }).server;
  const first = await connect(server);
  await first.read(new Uint8Array(1)); // most of its greeting is not yet written
  const second = await connect(server);
  const [ones, twos] = await Promise.all([first, second].map(receive));
  assert(ones!.every((byte) => byte === 1));
  assert(twos!.every((byte) => byte === 2));
});

/** What can be thrown, or be the reason of an abort, and the error reported for it. */
const THROWN: [thrown: unknown, message: string][] = [
  [REASON, "enough"],
  ["a string", 'not an Error: "a string"'],
  [undefined, "not an Error: undefined"],
  [Symbol("s"), "not an Error: Symbol(s)"],
  [{}, "not an Error: an object"],
  // These two fail when they are printed, or looked at with instanceof.
  [
    { [Symbol.for("Deno.customInspect")]: throwReason },
    "not an Error: an object",
  ],
  [revokedProxy(), "not an Error: an object"],
];

function throwReason(): never {
  throw REASON;
}

function revokedProxy(): unknown {
  const { proxy, revoke } = Proxy.revocable({}, {});
  revoke();
  return proxy;
}

/** An error that was made for what was thrown, or that is it. */
function assertIsFor(
  error: Error | undefined,
  thrown: unknown,
  message: string,
) {
  assertInstanceOf(error, Error);
  assertEquals(error?.message, message);
  assert(error === thrown || error?.cause === thrown);
}

test("serve() fails only the connection whose greeting function fails", async () => {
  const wrong = "greeting must be a string or a Uint8Array, not 5";
  const cases: [() => Greeting | Promise<Greeting>, unknown, string][] = [
    [() => Promise.reject(REASON), REASON, "enough"],
    [() => 5 as unknown as string, undefined, wrong],
    ...THROWN.map(([thrown, message]) =>
      [
        () => {
          throw thrown;
        },
        thrown,
        message,
      ] as [() => never, unknown, string]
    ),
  ];
  const left = cases.map(([greeting]) => greeting);
  const { server, outcomes } = start({
    greeting: () => left.shift()?.() ?? GREETING,
  });
  for (const [_, thrown, message] of cases) {
    assertEquals(await receiveText(await connect(server)), "");
    const { bytes, error } = outcomes.at(-1)!;
    assertEquals(bytes, 0);
    assertIsFor(error, thrown, message);
  }
  await assertGreets(server);
  await server.shutdown();
  const { bytes, error } = outcomes.at(-1)!;
  assertEquals([bytes, error], [GREETING.length, undefined]);
});

test("serve() waits for the promise of a greeting function, and keeps nobody else waiting", async () => {
  const slow = Promise.withResolvers<Uint8Array>();
  let calls = 0;
  await using server = start({
    greeting: () => calls++ === 0 ? slow.promise : GREETING,
  }).server;
  const first = await connect(server);
  for (let i = 0; i < 100; i++) await assertGreets(server);
  slow.resolve(new TextEncoder().encode("at last"));
  assertEquals(await receiveText(first), "at last");
});

// ========================= serve(): what a client does =========================

/** More than the buffers hold, on Linux. Windows may have the smallest ones. */
const most = isLinux ? LARGE.length : 1 << 20;
for (
  const [what, act] of [
    ["sends 100 kB", (conn: Deno.TcpConn) => send(conn, 100_000)],
    ["sends all that it has", (conn: Deno.TcpConn) => send(conn, most)],
    ["closes its half", (conn: Deno.TcpConn) => conn.closeWrite()],
  ] as const
) {
  test(`serve() greets a client that ${what} before it reads, with and without answer`, async () => {
    const small = new TextEncoder().encode(GREETING);
    for (
      const [greeting, answer] of [
        [small, false],
        [small, true],
        [LARGE, false],
        [LARGE, true],
      ] as const
    ) {
      const { server, errors } = start({ greeting, answer });
      await times(2, async () => {
        const conn = await connect(server);
        await act(conn);
        assert(equals(await receive(conn), greeting));
      });
      await server.shutdown();
      assertEquals(errors(), [undefined, undefined]);
    }
  });
}

test("serve() reports a client when it is greeted, and shows it the end, while the client stays", async () => {
  const { server, outcomes } = start({ timeout: 20_000 });
  using conn = await connectAndStay(server);
  assertEquals(await conn.read(new Uint8Array(1)), null);
  assertEquals([server.connections, outcomes.length], [1, 1]);
  for (let i = 0; i < 3; i++) { // to a server that still reads
    await send(conn, 100_000);
    assertEquals(server.connections, 1);
  }
  conn.close();
  await server.shutdown();
});

/** An error means that the other side has left. Systems name that differently. */
function assertLeft({ name }: Error): void {
  const names = "ConnectionReset ConnectionAborted BrokenPipe NotConnected";
  assert(names.split(" ").includes(name), name);
}

test("serve() takes no notice of clients that reset before they are accepted", async () => {
  const acceptErrors: Error[] = [];
  const { server, errors } = start({
    onAcceptError: (error) => void acceptErrors.push(error),
  });
  const seen = await clientsOfBlocked(server, { resets: 20, count: 20 });
  assertEquals(seen, Array(20).fill(GREETING));
  await server.shutdown();
  assertEquals(acceptErrors, []);
  // Windows may accept those that reset, and report them.
  const expected = Deno.build.os === "windows"
    ? errors().filter((e) => !e)
    : errors();
  assertEquals(expected, Array(20).fill(undefined));
});

test("serve() reports a client that resets while it is written to", async () => {
  const { server, outcomes } = start({ greeting: LARGE });
  await connectAndReset(server.addr.port, 1000);
  await server.shutdown();
  assertEquals(outcomes.length, 1);
  assertGreaterOrEqual(outcomes[0]!.bytes, 1000);
  assertLess(outcomes[0]!.bytes, LARGE.length);
  assertLeft(outcomes[0]!.error!);
});

test("serve() counts a client as greeted that resets right after its greeting, and is done with it", async () => {
  const reset = Promise.withResolvers<void>();
  using _ = replaceAccept(async (accept) => {
    const conn = await accept();
    const { write } = conn;
    return Object.assign(conn, {
      async write(data: Uint8Array) {
        const written = await write.call(conn, data);
        await reset.promise; // only then the server hears of its write
        return written;
      },
      // On Linux a half-close after a reset does not fail. On macOS it does.
      closeWrite: () => Promise.reject(new Deno.errors.NotConnected()),
    });
  });
  const { server, errors } = start();
  await connectAndReset(server.addr.port, GREETING.length);
  reset.resolve();
  await within(500, until(() => errors().length === 1 && !server.connections));
  assertEquals(errors(), [undefined]);
  await server.shutdown();
});

test("serve() reads what a client sends while the kernel takes no more of its greeting", async () => {
  const sent = Promise.withResolvers<void>();
  let writes = 0;
  using _ = replaceWrite(async (write) => {
    if (writes++ > 0) await sent.promise;
    return await write();
  });
  await using server = start({ greeting: LARGE }).server;
  const conn = await connect(server);
  await send(conn, most);
  sent.resolve();
  assert(equals(await receive(conn), LARGE));
});

test("serve() closes a client that sends for ever, and greets others meanwhile", async () => {
  const { server, errors } = start({ timeout: 500 });
  using conn = await connect(server);
  const flood = assertRejects(async () => {
    while (true) await conn.write(LARGE);
  });
  for (let i = 0; i < 50; i++) await assertGreets(server);
  await flood;
  await server.shutdown();
  assertEquals(errors(), Array(51).fill(undefined));
});

test("serve() greets others while a client always has more for it to read", async () => {
  // A read never waits, however fast the server reads.
  using _ = replaceAccept(async (accept) => {
    const conn = await accept();
    const { close } = conn;
    let closed = false;
    return Object.assign(conn, {
      read: () => closed ? Promise.reject() : Promise.resolve(1),
      close() {
        closed = true;
        close.call(conn);
      },
    });
  });
  await using server = start({ timeout: 100 }).server;
  await assertGreets(server);
  await assertGreets(server);
});

test("serve() holds no more than maxConnections, and greets all in turn", async () => {
  let held = 0;
  const { server, outcomes } = start({
    maxConnections: 10,
    timeout: 50,
    greeting() {
      held = Math.max(held, server.connections);
      return GREETING;
    },
  });
  // They read, but never close.
  const conns = await times(100, () => connectAndStay(server));
  await server.shutdown();
  conns.forEach((conn) => conn.close());
  assertEquals([outcomes.length, held], [100, 10]);
});

test("serve() gives a place that becomes free to the next client, and a hundred places at once", async () => {
  const { server } = start({
    maxConnections: 100,
    answer: true, // silent clients hold their places
    timeout: 20_000,
  });
  const next = async () => {
    const conn = await connect(server);
    await send(conn, 1);
    return conn;
  };
  const silent = await inTurn(100, () => connect(server));
  await until(() => server.connections === 100);
  const waiting = await times(10, next);
  silent.pop()!.close();
  await within(5000, assertAllGreeted(waiting)); // all of them in the one place
  await until(() => server.connections === 99);
  silent.push(await connect(server));
  waiting.splice(0, 10, ...await inTurn(100, next));
  silent.forEach((conn) => conn.close());
  await within(5000, assertAllGreeted(waiting));
  await server.shutdown();
});

// ============= serve(): thousands are greeted in their order =============

/**
 * Holds every write, as if the kernel took no bytes, until the test lets it go on.
 * That happens when the kernel lacks memory; no client can bring it about.
 */
function holdWrites() {
  const held: (() => void)[] = [];
  const replaced = replaceWrite(async (write) => {
    await new Promise<void>((go) => held.push(go));
    return await write();
  });
  return {
    /** Waits until `of` writes are held, no more, and lets `count` of them go. */
    async release(count: number, of = count) {
      await until(() => held.length >= of);
      assertEquals(held.length, of);
      held.splice(0, count).forEach((go) => go());
    },
    [Symbol.dispose]: replaced[Symbol.dispose],
  };
}

for (
  const [what, count, answer, delay] of [
    ["came while the kernel was busy", 1100, false, 0],
    ["have spoken", 10, true, 0],
    ["have a slow greeting function", 10, false, 50],
  ] as const
) {
  test(`serve() greets ${count} clients that ${what} before those that come later`, async () => {
    using writes = holdWrites();
    let ready = 0;
    const { server, outcomes } = start({
      timeout: 20_000,
      answer,
      async greeting() {
        if (delay > 0) await sleep(delay);
        ready++;
        return GREETING;
      },
    });
    async function come(number: number) {
      const before = ready;
      const conns = await inTurn(number, () => connect(server));
      for (const conn of conns) if (answer) await send(conn, 1);
      await until(() => ready === before + number);
      return conns;
    }
    const first = await come(1); // is written to alone
    const group = await come(count);
    await writes.release(1);
    await writes.release(0, count);
    const later = await come(3);
    await sleep(100); // in which the later ones would be written to
    await writes.release(count - 1, count);
    await until(() => outcomes.length === count); // with the first one
    await writes.release(1); // the later ones wait even for the last one
    await writes.release(3);
    await assertAllGreeted([...first, ...group, ...later]);
    await server.shutdown();
  });
}

test("serve() cuts off clients that the kernel keeps waiting, and greets the next one", async () => {
  using writes = holdWrites();
  const { server, outcomes, errors } = start({ timeout: 100 });
  const conns = await times(3, () => connect(server));
  await until(() => outcomes.length === 3);
  assertEquals(server.connections, 0);
  for (const error of errors()) assertInstanceOf(error, Deno.errors.TimedOut);
  await writes.release(1);
  await writes.release(2);
  const next = assertGreets(server);
  await writes.release(1);
  await next;
  await server.shutdown();
  conns.forEach((conn) => conn.close());
});

// ====================== serve(): clients that speak first ======================

test("serve() with answer waits until a client speaks, then calls the greeting function", async () => {
  let calls = 0;
  const greeting = () => `${++calls}`;
  await using server = start({ answer: true, greeting }).server;
  const silent = await connect(server);
  const text = receiveText(silent);
  await until(() => server.connections === 1);
  const second = await connect(server);
  await send(second, 1);
  assertEquals(await receiveText(second), "1");
  await send(silent, 1);
  assertEquals(await text, "2");
});

test("serve() with answer counts the time before and after a client speaks as one", async () => {
  const { server, outcomes, errors } = start({
    answer: true,
    timeout: 400,
    greeting: () => NEVER,
  });
  using conn = await connect(server);
  await until(() => server.connections === 1);
  const end = within(650, until(() => outcomes.length === 1));
  await sleep(300); // so that twice the timeout would end at 700 ms
  await send(conn, 1);
  await end;
  assertEquals(errors()[0]!.message, "not greeted in 400 ms");
  assertGreaterOrEqual(outcomes[0]!.milliseconds, 400);
  await server.shutdown();
});

test("serve() with answer reports a client that resets before it speaks", async () => {
  const { server, outcomes, errors } = start({ answer: true });
  const socket = new Socket();
  socket.connect(server.addr.port, "127.0.0.1");
  await until(() => server.connections === 1);
  socket.resetAndDestroy();
  await server.shutdown();
  assertEquals(outcomes.length, 1);
  assertInstanceOf(errors()[0], Deno.errors.ConnectionReset);
});

/** The answer to every HTTP request, as the README shows it. */
const HTTP_ANSWER = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n" +
  "Connection: close\r\n\r\n";

test("serve() with answer is an HTTP target for GET and HEAD, for fetch() and node:http", async () => {
  const { server, errors } = start({ answer: true, greeting: HTTP_ANSWER });
  const url = `http://127.0.0.1:${server.addr.port}/health`;
  for (let i = 0; i < 100; i++) {
    for (const method of ["GET", "HEAD"]) {
      const response = await fetch(url, { method });
      assertEquals([response.status, await response.text()], [200, ""]);
      const status = await new Promise<number | undefined>((resolve, reject) =>
        http.request(url, { method }, (response) => {
          response.resume().on("end", () => resolve(response.statusCode));
        }).on("error", reject).end()
      );
      assertEquals(status, 200);
    }
  }
  await server.shutdown();
  assertEquals(errors(), Array(400).fill(undefined));
});

// =========================== serve(): the deadlines ===========================

test("serve() cuts off each client at its own timeout, whatever it waits for", async () => {
  const timeout = 400;
  const cases: [ServeOptions, string][] = [
    [{ greeting: LARGE }, "not greeted in 400 ms"], // it reads nothing
    [{ greeting: () => NEVER }, "not greeted in 400 ms"],
    [{ answer: true }, "the client sent nothing in 400 ms"],
  ];
  await Promise.all(cases.map(async ([options, message]) => {
    const { server, outcomes } = start({ timeout, ...options });
    const conns: Deno.Conn[] = [];
    const ends: Promise<void>[] = [];
    for (let i = 0; i < 5; i++) {
      conns.push(await connect(server));
      // At the first tick after its time: a tick is a quarter of the timeout.
      ends.push(within(timeout * 1.25 + 100, until(() => outcomes.length > i)));
      await sleep(50); // not to be in one tick
    }
    await Promise.all(ends);
    await server.shutdown();
    assertEquals(outcomes.length, 5);
    for (const [i, { error, bytes, milliseconds }] of outcomes.entries()) {
      assertInstanceOf(error, Deno.errors.TimedOut);
      assertEquals(error?.message, message);
      assertGreaterOrEqual(milliseconds, timeout);
      assertLess(bytes, LARGE.length);
      // It can still read what the kernel has taken for it.
      assertEquals((await receive(conns[i]!)).length, bytes);
    }
  }));
});

test("serve() cuts off a hundred silent clients at the same time", async () => {
  const { server, errors } = start({ answer: true, timeout: 400 });
  const conns = await inTurn(100, () => connect(server));
  await within(600, until(() => errors().length === 100));
  for (const error of errors()) assertInstanceOf(error, Deno.errors.TimedOut);
  conns.forEach((conn) => conn.close());
  await server.shutdown();
});

test("serve() takes no notice of a greeting function that fails after its client was cut off", async () => {
  const late = Promise.withResolvers<string>();
  const { server, errors } = start({
    timeout: 100,
    greeting: () => late.promise,
  });
  assertEquals(await receiveText(await connect(server)), "");
  late.reject(REASON);
  await server.shutdown();
  assertEquals(errors().length, 1);
  assertInstanceOf(errors()[0], Deno.errors.TimedOut);
});

test("serve() cuts off a client that reads a large greeting too slowly", async () => {
  const { server, outcomes, errors } = start({ greeting: LARGE, timeout: 400 });
  using conn = await connect(server);
  const buffer = new Uint8Array(100_000);
  const end = within(700, until(() => outcomes.length === 1));
  let over = false;
  end.finally(() => over = true);
  let bytes = 0;
  // About 5 MB/s. The server writes all the time.
  while (!over) {
    bytes += await conn.read(buffer) ?? 0;
    await sleep(20);
  }
  await end;
  assertInstanceOf(errors()[0], Deno.errors.TimedOut);
  for (let n; (n = await conn.read(buffer)) !== null;) bytes += n;
  assertEquals(outcomes[0]!.bytes, bytes);
  await server.shutdown();
});

test("serve() never counts a client as greeted that reads nothing, where the kernel takes any write", async () => {
  // So does Windows: if its buffer is not full, it takes a write of any size.
  let taken = 0;
  using _ = replaceWrite((_, data) => {
    if (taken > 500_000) return NEVER;
    taken += data.length;
    return Promise.resolve(data.length);
  });
  const { server, outcomes, errors } = start({ greeting: LARGE, timeout: 50 });
  using _conn = await connect(server);
  await until(() => outcomes.length > 0);
  await server.shutdown();
  assertInstanceOf(errors()[0], Deno.errors.TimedOut);
  assertEquals(outcomes.map(({ bytes }) => bytes), [taken]);
});

test("serve() never reports a client as greeted that it has cut off", async () => {
  const cutOff = Promise.withResolvers<void>();
  // The kernel takes the greeting, but the client is cut off before the server
  // hears of it.
  using _ = replaceWrite(async (write) => {
    const written = await write();
    await cutOff.promise;
    return written;
  });
  const { server, outcomes, errors } = start({ timeout: 50 });
  using _conn = await connect(server);
  await until(() => outcomes.length > 0);
  cutOff.resolve();
  await server.shutdown();
  assertEquals(outcomes.length, 1);
  assertInstanceOf(errors()[0], Deno.errors.TimedOut);
});

test("serve() lets a greeted client linger for a second, or for the timeout if that is less or the greeting large", async () => {
  const cases = [[400, 400, 18], [20_000, 1000, 18], [1500, 1500, 100_000]];
  await Promise.all(cases.map(async ([timeout, lingers, size]) => {
    const { server, outcomes } = start({
      timeout,
      maxConnections: 1,
      // Takes a part of the timeout.
      greeting: () => sleep(300).then(() => new Uint8Array(size!)),
    });
    using conn = await connect(server);
    await until(() => outcomes.length === 1);
    const greeted = performance.now();
    // The next client has to wait for it, and for its own greeting. A tick is
    // 250 ms at the most.
    const tick = Math.min(250, timeout! / 4);
    const next = receive(await connect(server));
    const { length } = await within(lingers! + tick + 300 + 150, next);
    assertEquals(length, size);
    const lingered = performance.now() - greeted - 300;
    assertGreaterOrEqual(lingered, lingers! - 10); // it saw that a little late
    assertEquals((await receive(conn)).length, size);
    await server.shutdown();
    assertEquals(outcomes.map(({ error }) => error), [undefined, undefined]);
  }));
});

test("serve() waits for the whole timeout until a client has read more than 64 KiB", async () => {
  // Windows takes no more than 256 KiB before its client reads.
  await Promise.all([65_536, 65_537, 250_000].map(async (size) => {
    const large = LARGE.subarray(0, size);
    let calls = 0;
    const { server, outcomes } = start({
      timeout: 20_000,
      greeting: () => calls++ === 0 ? large : GREETING,
    });
    using slow = await connect(server);
    await until(() => outcomes.length === 1); // the kernel has taken all
    // The next client would stay for ever. It is closed after a second, and the
    // first one has come before.
    using next = await connectAndStay(server);
    const stays = size > 65_536;
    await within(5000, until(() => server.connections === (stays ? 1 : 0)));
    if (stays) { // or this would be answered with a reset
      await send(slow, 10);
      assert(equals(await receive(slow), large));
    }
    next.close();
    slow[Symbol.dispose]();
    await server.shutdown();
  }));
});

// ======================== serve(): accept() that fails ========================

/** Puts a function in the place of accept(), of all listeners. */
function replaceAccept(
  replacement: (accept: () => Promise<Deno.TcpConn>) => Promise<Deno.TcpConn>,
): Disposable {
  using listener = Deno.listen({ port: 0 });
  const prototype = Object.getPrototypeOf(listener);
  const { accept } = prototype;
  prototype.accept = function () {
    return replacement(() => accept.call(this));
  };
  return { [Symbol.dispose]: () => prototype.accept = accept };
}

/** Puts a function in the place of write(), of all accepted connections. */
function replaceWrite(
  replacement: (
    write: () => Promise<number>,
    data: Uint8Array,
  ) => Promise<number>,
): Disposable {
  return replaceAccept(async (accept) => {
    const conn = await accept();
    const { write } = conn;
    return Object.assign(conn, {
      write: (data: Uint8Array) =>
        replacement(() => write.call(conn, data), data),
    });
  });
}

/** Lets accept() fail with each of these errors, a turn later, then succeed. */
function failAccept(...errors: Error[]): Disposable {
  return replaceAccept(async (accept) => {
    if (errors.length === 0) return await accept();
    await setImmediate();
    throw errors.shift();
  });
}

/** What Deno throws when the process is out of file descriptors. */
const outOfDescriptors = () => new Error("Too many open files (os error 24)");

test("serve() reports that accept() has failed, and tries again after 10 to 100 ms, whatever the error", async () => {
  // Without a pause, an error that repeats would make the process spin. A TypeError
  // is what Deno throws when another program has ended the listening socket.
  const failures = Array.from({ length: 12 }, (_, i) =>
    [
      outOfDescriptors(),
      new TypeError("Invalid argument (os error 22)"),
      new Deno.errors.PermissionDenied(), // by a firewall
    ][i % 3]!);
  const errors: Error[] = [];
  const { server } = start({ onAcceptError: (e) => void errors.push(e) });
  async function timeToGreet(failures: Error[]) {
    using _ = failAccept(...failures);
    await assertGreets(server); // by the call of accept() that waits already
    const began = performance.now();
    await assertGreets(server);
    return performance.now() - began;
  }
  const many = await timeToGreet(failures); // 10 + 20 + ... + 100 + 100 + 100
  assert(700 < many && many < 1200, `${many} ms`);
  const few = await timeToGreet(failures.slice(0, 4)); // 10 + 20 + 30 + 40
  assert(90 < few && few < 300, `${few} ms`);
  await server.shutdown();
  // On macOS a TypeError may mean that the client has left.
  const isMac = Deno.build.os === "darwin";
  const reported = [...failures, ...failures.slice(0, 4)];
  assertEquals(
    errors,
    reported.filter((e) => !(isMac && e instanceof TypeError)),
  );
});

test("serve() goes on at once, without a report, if accept() fails because the client has left", async () => {
  // The errors of other systems, where Linux accepts the dead connection.
  const { ConnectionAborted, ConnectionReset, NotConnected } = Deno.errors;
  const kinds = [ConnectionAborted, ConnectionReset, NotConnected];
  using _ = failAccept(
    ...Array.from({ length: 200 }, (_, i) => new kinds[i % kinds.length]!()),
  );
  const errors: Error[] = [];
  const { server } = start({ onAcceptError: (e) => void errors.push(e) });
  await within(1000, assertGreets(server)); // 10 ms after each would be 2 s
  await server.shutdown();
  assertEquals(errors, []);
});

// ============================= serve(): stopping =============================

/** Waits until a server no longer listens. */
async function untilRefused(server: Server): Promise<void> {
  // Clients that come too often would keep it listening.
  for (let pause = 100;; pause *= 2) {
    await sleep(pause);
    try {
      (await connect(server)).close();
    } catch {
      return;
    }
  }
}

test("shutdown() accepts no more, lets open connections end, and can be called again", async () => {
  const { server, outcomes } = start({ greeting: LARGE });
  const conn = await connect(server);
  await until(() => server.connections === 1);
  const first = server.shutdown();
  const second = server.shutdown();
  await untilRefused(server);
  assertGreaterOrEqual(server.connections, 1);
  assert(equals(await receive(conn), LARGE));
  await Promise.all([first, second, server.finished, server.shutdown()]);
  const whole = outcomes.filter(({ bytes }) => bytes === LARGE.length);
  assertEquals([server.connections, whole.length], [0, 1]);
  const { hostname, port } = server.addr; // which are free again
  await serve({ hostname, port }).shutdown();
  await server.shutdown(); // for which nothing is left to do
});

for (
  const [name, tcpBacklog, clients] of [
    ["a hundred", 65535, 100],
    // Linux queues one more than it is told.
    ["with a backlog of 1", 1, isLinux ? 2 : 1],
  ] as const
) {
  test(`shutdown() greets the clients in the queue when it has a place for them, ${name}`, async () => {
    const { server } = start({
      tcpBacklog,
      maxConnections: 1,
      timeout: 20_000,
      answer: true,
    });
    const silent = await connect(server); // holds the only place
    await until(() => server.connections === 1);
    const waiting = await inTurn(clients, () => connect(server));
    for (const conn of waiting) await send(conn, 1);
    const { shutdown } = server; // as it is handed to a signal, say
    const shut = shutdown();
    for (let turn = 0; turn < 100; turn++) await sleep(0);
    silent.close();
    await assertAllGreeted(waiting);
    await shut;
    await assertRefuses(server);
  });
}

for (
  const [what, count, failure] of [
    ["fails", 20, outOfDescriptors],
    [
      "gives clients that have left",
      5000,
      () => new Deno.errors.NotConnected(),
    ],
  ] as const
) {
  test(`shutdown() greets the clients in the queue though accept() ${what} ${count} times`, async () => {
    using _ = failAccept(...Array.from({ length: count }, failure));
    const { server } = start();
    const waiting = await times(10, () => connect(server));
    const shut = server.shutdown();
    await assertAllGreeted(waiting);
    await shut;
  });
}

test("shutdown() waits for a client that accept() gives as the listener is closed", async () => {
  const close = Promise.withResolvers<void>();
  using _ = replaceAccept(async (accept) => {
    const conn = await accept();
    await close.promise;
    return conn;
  });
  const { server, errors } = start();
  const conn = await connect(server);
  const shut = server.shutdown();
  await untilRefused(server);
  close.resolve();
  const greeted = assertAllGreeted([conn]);
  await shut;
  assertEquals([server.connections, errors()], [0, [undefined]]);
  await greeted;
});

test("shutdown() greets the queue of a process that is blocked for longer than the timeout", async () => {
  const { server } = start({ timeout: 400 });
  const seen = await clientsOfBlocked(server, {
    async afterwards() {
      server.shutdown();
      for (let i = 0; i < 10; i++) await null; // the stop has begun
      const end = performance.now() + 600;
      while (performance.now() < end);
    },
  });
  assertEquals(seen, Array(100).fill(GREETING));
  await server.finished;
});

/** Talks on so many connections to a port, without end. */
function busyThread() {
  const thread = self as unknown as Worker;
  thread.onmessage = async ({ data: { port, count } }) => {
    for (let i = 0; i < count; i++) {
      const conn = await Deno.connect({ hostname: "127.0.0.1", port });
      echo(conn);
      await conn.write(new Uint8Array(1000));
    }
  };
}

/** Sends back what it reads. */
async function echo(conn: Deno.Conn): Promise<void> {
  const buffer = new Uint8Array(1000);
  try {
    while (await conn.read(buffer) !== null) await conn.write(buffer);
  } catch {
    // The other side is gone.
  }
  conn.close();
}

test("shutdown() greets the queue beside 200 busy connections of the same program", async () => {
  const count = 200;
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const thread = startThread(`${echo} (${busyThread})();`);
  thread.post({ port: listener.addr.port, count });
  const echoes: Promise<void>[] = [];
  for (let i = 0; i < count; i++) echoes.push(echo(await listener.accept()));
  const { server } = start({ timeout: 20_000 });
  const seen = await clientsOfBlocked(server, { afterwards: server.shutdown });
  assertEquals(seen, Array(100).fill(GREETING));
  await server.finished;
  thread.end();
  await Promise.all(echoes);
});

test("shutdown() greets the queue beside code that never lets the event loop rest", async () => {
  let busy = true;
  const work = (async () => {
    while (busy) {
      const end = performance.now() + 2;
      while (performance.now() < end);
      await setImmediate();
    }
  })();
  const { server } = start();
  const seen = await clientsOfBlocked(server, { afterwards: server.shutdown });
  assertEquals(seen, Array(100).fill(GREETING));
  await server.finished;
  busy = false;
  await work;
});

test("shutdown() goes on accepting while clients come, for as long as the timeout", async () => {
  const clients: Promise<unknown>[] = [];
  const { server, outcomes } = start({
    timeout: 1200,
    maxConnections: 50,
    greeting() { // whenever one is accepted, another comes
      const next = connect(server).then(receive).catch(() => {});
      clients.push(next);
      return GREETING;
    },
  });
  await times(30, () => assertGreets(server));
  const before = outcomes.length;
  const began = performance.now();
  await within(1600, server.shutdown());
  assertGreaterOrEqual(performance.now() - began, 1200);
  assertGreater(outcomes.length - before, 5);
  await Promise.all(clients);
});

test("shutdown() greets clients that speak meanwhile, and waits for silent ones until their deadline", async () => {
  const { server, errors } = start({ answer: true, timeout: 300 });
  const silent = await connect(server);
  const speaker = await connect(server);
  await until(() => server.connections === 2);
  const shut = server.shutdown();
  await send(speaker, 1);
  await assertAllGreeted([speaker]);
  assertEquals(await receiveText(silent), "");
  await shut;
  const [greeted, cutOff] = errors();
  assertEquals(greeted, undefined);
  assertInstanceOf(cutOff, Deno.errors.TimedOut);
});

test("await using greets the queue, and waits for open connections", async () => {
  const { server, errors } = start({ timeout: 100 });
  using _conn = await connectAndStay(server);
  let seen: Promise<string[]>;
  {
    await using _ = server;
    seen = clientsOfBlocked(server);
  }
  assertEquals([server.connections, errors().length], [0, 101]);
  assertEquals(await seen, Array(100).fill(GREETING));
});

// ============================= serve(): aborting =============================

/** A server whose clients would keep it for ever, and what aborts it. */
function startAbortable(options: ServeOptions = {}) {
  const controller = new AbortController();
  const { signal } = controller;
  const abort = (reason: unknown = REASON) => controller.abort(reason);
  const running = start({ timeout: 600_000, signal, ...options });
  const finishedAtOnce = () => within(500, running.server.finished);
  return { abort, finishedAtOnce, ...running };
}

for (
  const [clients, options, expected] of [
    ["are being written to", { greeting: LARGE }, REASON],
    ["have not spoken yet", { answer: true }, REASON],
    ["wait for a greeting function", { greeting: () => NEVER }, REASON],
    ["wait until others are written to", {}, REASON],
    ["are greeted and stay", {}, undefined],
  ] as const
) {
  test(`an aborted signal closes clients that ${clients} at once, and leaves nothing to a shutdown`, async () => {
    using writes = clients === "wait until others are written to"
      ? holdWrites()
      : undefined;
    const { server, outcomes, errors, abort, finishedAtOnce } = startAbortable(
      options,
    );
    const conns = await times(5, () => connect(server));
    await until(() => server.connections === 5);
    if (!expected) await until(() => outcomes.length === 5);
    abort();
    assertEquals(server.connections, 0);
    abort(); // again, to which nothing happens
    await finishedAtOnce();
    await server.shutdown();
    assertEquals(errors(), Array(5).fill(expected));
    await assertRefuses(server);
    await writes?.release(1);
    await writes?.release(4);
    const received = await Promise.all(conns.map(receive));
    const sum = (numbers: number[]) => numbers.reduce((a, b) => a + b);
    const bytes = sum(outcomes.map(({ bytes }) => bytes));
    assertEquals(bytes, sum(received.map(({ length }) => length)));
  });
}

test("an abort in the greeting function closes the client at once", async () => {
  const { server, errors, abort, finishedAtOnce } = startAbortable({
    greeting() {
      abort();
      return NEVER;
    },
  });
  using _conn = await connect(server);
  await finishedAtOnce();
  assertEquals(errors(), [REASON]);
});

test("an abort in onAcceptError ends the pause after a failed accept()", async () => {
  using _ = failAccept(outOfDescriptors());
  const { server, abort, finishedAtOnce } = startAbortable({
    onAcceptError: () => abort(),
  });
  await finishedAtOnce();
  await assertRefuses(server);
});

test("an aborted signal closes a connection that is just being accepted", async () => {
  using _ = replaceAccept(async (accept) => {
    const conn = await accept();
    abort();
    return conn;
  });
  const { server, errors, abort, finishedAtOnce } = startAbortable();
  assertEquals(await receiveText(await connect(server)), "");
  await finishedAtOnce();
  assertEquals(errors(), [REASON]);
});

test("an abort in onOutcome closes all other clients", async () => {
  const outcomes: Outcome[] = [];
  let calls = 0;
  const { server, abort, finishedAtOnce } = startAbortable({
    greeting: () => ++calls === 3 ? GREETING : NEVER,
    onOutcome(outcome) {
      outcomes.push(outcome);
      abort();
    },
  });
  const conns = await times(3, () => connect(server));
  await finishedAtOnce();
  const errors = outcomes.map(({ error }) => error);
  assertEquals(errors, [undefined, REASON, REASON]);
  conns.forEach((conn) => conn.close());
});

for (
  const [doing, maxConnections, open] of [
    ["still greets the queue", 1, 1],
    ["waits for open connections", 10, 2],
  ] as const
) {
  test(`an aborted signal ends a shutdown that ${doing}`, async () => {
    const options = { maxConnections, greeting: LARGE };
    const { server, errors, abort } = startAbortable(options);
    const conns = await times(2, () => connect(server));
    await until(() => server.connections === open);
    const shut = server.shutdown();
    if (open === 2) await untilRefused(server);
    abort();
    await within(500, shut);
    // The clients of untilRefused() have left.
    const aborted = errors().filter((error) => error === REASON);
    assertEquals(aborted.length, open);
    await assertRefuses(server);
    conns.forEach((conn) => conn.close());
  });
}

test("an aborted signal does not harm a server that has stopped, and has no hold of it", async () => {
  const listeners = new Set<unknown>();
  const controller = new AbortController();
  const signal = Object.assign(controller.signal, {
    addEventListener: (_: string, f: unknown) => void listeners.add(f),
    removeEventListener: (_: string, f: unknown) => void listeners.delete(f),
  });
  const { server } = start({ signal });
  assertEquals(listeners.size, 1);
  await server.shutdown();
  assertEquals(listeners.size, 0);
  controller.abort();
  await server.finished;
});

test("an abort reason of any kind reaches onOutcome as an Error", async () => {
  for (const [reason, message] of THROWN) {
    if (reason === undefined) continue; // means the default reason
    const { server, errors, abort, finishedAtOnce } = startAbortable({
      greeting: () => NEVER,
    });
    using _conn = await connect(server);
    await until(() => server.connections === 1);
    abort(reason);
    await finishedAtOnce();
    assertEquals([server.connections, errors().length], [0, 1]);
    assertIsFor(errors()[0], reason, message);
  }
});

test("serve() throws the reason of a signal that is aborted already", async () => {
  await using server = start().server; // whose port would be in use
  const { hostname, port } = server.addr;
  const signal = AbortSignal.abort(REASON);
  assertThrows(() => serve({ hostname, port, signal }), Error, "enough");
});

// ================= serve(): callbacks, and a test's fake timers =================

// Not test(), which fails at an uncaught error.
Deno.test("serve() goes on when callbacks fail, and their errors are uncaught ones", async () => {
  const uncaught: string[] = [];
  using _uncaught = onUncaughtError(({ message }) => uncaught.push(message));
  using _ = failAccept(outOfDescriptors());
  let calls = 0;
  const { server } = start({
    onOutcome() {
      if (calls++ === 0) throw new Error("thrown");
      return Promise.reject(new Error("rejected"));
    },
    onAcceptError() {
      throw new Error("accept");
    },
  });
  await assertGreets(server);
  await assertGreets(server);
  await server.shutdown();
  await until(() => uncaught.length >= 3);
  assertEquals(uncaught, ["accept", "thrown", "rejected"]);
  assertEquals(server.connections, 0);
});

test("serve() works in a test that has faked the timers since the module was loaded", async () => {
  const { setTimeout, setInterval, queueMicrotask } = globalThis;
  const never = () => 0;
  Object.assign(globalThis, {
    setTimeout: never,
    setInterval: never,
    queueMicrotask: never,
  });
  try {
    const { server, outcomes, errors } = start({
      timeout: 50,
      greeting: LARGE,
    });
    const conn = await connect(server);
    await server.shutdown();
    conn.close();
    assertEquals(outcomes.length, 1);
    assertInstanceOf(errors()[0], Deno.errors.TimedOut);
  } finally {
    Object.assign(globalThis, { setTimeout, setInterval, queueMicrotask });
  }
});

// ===================== serve(): clients that act at random =====================

/** Numbers from 0 to 1 that a seed determines (mulberry32). */
function randomFrom(seed: number): () => number {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** What a client of a random crowd saw, if it read to its end. */
interface Visit {
  /** To be closed when all are done. */
  conn: Deno.Conn;
  received?: Uint8Array;
  ended: number;
}

/** A client that does something at random. */
async function randomVisit(
  conn: Deno.TcpConn,
  pick: <T>(...choices: T[]) => T,
): Promise<Visit> {
  const before = pick("", "", "send 10", "send 300000", "half-close");
  const manner = pick("read", "read", "read", "stall", "part", "leave");
  const pieces: Uint8Array[] = [];
  try {
    if (before.startsWith("send")) await send(conn, +before.slice(5));
    if (before === "half-close") await conn.closeWrite();
    if (manner === "stall") return { conn, ended: NaN };
    while (manner !== "leave") {
      const piece = new Uint8Array(100_000);
      const n = await conn.read(piece);
      if (n === null) break;
      pieces.push(piece.subarray(0, n));
      if (manner === "part") break;
    }
  } catch (error) {
    assertLeft(error as Error);
  }
  const ended = performance.now();
  if (manner === "read") return { conn, received: concat(pieces), ended };
  conn.close(); // with what was not read, and so a reset
  return { conn, ended };
}

/** A server with random options and its crowd, all from one seed. */
async function randomCrowd(seed: number) {
  const random = randomFrom(seed);
  const pick = <T>(...choices: T[]) =>
    choices[Math.floor(random() * choices.length)]!;
  const size = pick(0, 1, 18, 5000, 300_000, 4_000_000);
  const whole = LARGE.subarray(seed % 1000, seed % 1000 + size);
  const timeout = pick(100, 300);
  const outcomes: (Outcome & { at: number })[] = [];
  const { server } = start({
    greeting: pick<ServeOptions["greeting"]>(
      whole,
      () => whole,
      () => Promise.resolve(whole),
      () => sleep(5).then(() => whole),
    ),
    maxConnections: pick(2, 10, 100),
    timeout,
    onOutcome: (o) => void outcomes.push({ ...o, at: performance.now() }),
  });
  const visits = await times(30, async (i) => {
    if (i % 10 === 0) await connectAndReset(server.addr.port);
    return await randomVisit(await connect(server), pick);
  });
  for (const { conn, received, ended } of visits) {
    const { port } = conn.localAddr as Deno.NetAddr;
    conn[Symbol.dispose]();
    if (!received) continue;
    assert(startsWith(whole, received), "wrong bytes");
    const outcome = outcomes.find((o) => o.remoteAddr.port === port)!;
    assert(outcome, "no outcome");
    if (received.length === whole.length) continue;
    // It has lost something: then its time was up.
    const { at, milliseconds, error } = outcome;
    const deadline = error ? at - milliseconds + timeout : at + timeout;
    assertGreaterOrEqual(ended, deadline - 2, `lost bytes: ${error}`);
  }
  await server.shutdown();
  assertEquals(server.connections, 0);
  const ports = outcomes.map(({ remoteAddr }) => remoteAddr.port);
  assertEquals(new Set(ports).size, ports.length, "two outcomes for a client");
}

test("serve() keeps its promise to a random crowd, with one outcome for each client", async () => {
  const [given] = Deno.args.map(Number); // deno test --allow-net -- SEED
  const first = Math.floor(Math.random() * 2 ** 31);
  const seeds = given === undefined
    ? Array.from({ length: 10 }, (_, i) => first + i)
    : [given];
  // All are awaited, so that one that fails does so alone.
  const crowds = await Promise.allSettled(seeds.map(randomCrowd));
  const failures = crowds.flatMap((crowd, i) =>
    crowd.status === "rejected" ? [`seed ${seeds[i]}: ${crowd.reason}`] : []
  );
  assertEquals(failures, []);
});

// ====================== serve(): addresses and options ======================

const hasIPv6 = (() => {
  try {
    Deno.listen({ hostname: "::1", port: 0 }).close();
    return true;
  } catch {
    return false;
  }
})();

test("serve() listens on IPv6 alone", async () => {
  await using server = serve({ hostname: "::1", port: 0 });
  const { port } = server.addr;
  await assertAllGreeted([await Deno.connect({ hostname: "::1", port })]);
  await assertRefuses(server);
}, !hasIPv6);

test(
  "serve() listens on IPv6 and IPv4 on ::, and shows IPv4 addresses as such",
  async () => {
    let calls = 0;
    const { server, outcomes } = start({
      hostname: "::",
      greeting({ hostname }) {
        if (calls++ % 2 === 1) throw REASON;
        return hostname;
      },
    });
    for (const hostname of ["::1", "127.0.0.1"]) {
      for (const expected of [hostname, ""]) {
        const conn = await Deno.connect({ hostname, port: server.addr.port });
        assertEquals(await receiveText(conn), expected);
        assertEquals(outcomes.at(-1)!.remoteAddr, conn.localAddr);
      }
    }
    await server.shutdown();
  },
  !hasIPv6 || Deno.build.os === "windows", // where :: is IPv6 alone
);

test("serve() throws where it cannot listen", async () => {
  await using server = start().server;
  const { hostname, port } = server.addr;
  assertThrows(() => serve({ hostname, port }), Deno.errors.AddrInUse);
  assertThrows( // RFC 5737: an address for documentation, never a machine's
    () => serve({ hostname: "203.0.113.1", port: 0 }),
    Deno.errors.AddrNotAvailable,
  );
  assertThrows(() => serve({ hostname: "no such name", port: 0 }));
  assertThrows(() => serve({ hostname: "", port: 0 }), Error, "empty host");
  await assertGreets(server);
});

const MAX = 2 ** 31 - 1;
const NO_COUNTS = [0, -1, 1.5, MAX + 1, NaN, Infinity];
const controller = new AbortController();
/** Values that options take, that throw a RangeError, and that throw a TypeError. */
const OPTIONS: Record<string, [unknown[], unknown[], unknown[]]> = {
  hostname: [["localhost"], [], [null, 5, {}, revokedProxy()]],
  port: [[0, 65535], [-1, 65536, 1.5, NaN, Infinity], [null, "9000", true, 1n]],
  tcpBacklog: [[1, MAX], NO_COUNTS, [null, "1", [1]]],
  timeout: [[1, MAX], NO_COUNTS, [null, "1", Symbol("1")]],
  maxConnections: [[1, MAX], NO_COUNTS, [null, "1", { valueOf: () => 1 }]],
  greeting: [["", new Uint8Array(), () => ""], [], [null, 5, {}, [1, 2]]],
  answer: [[true, false], [], [null, "no", 0, 1]],
  reusePort: [[true, false], [], [null, "no", 0, 1]],
  signal: [[AbortSignal.abort(REASON)], [], [null, controller, {}, "abort"]],
  onOutcome: [[() => {}], [], [null, 5, {}, "f"]],
  onAcceptError: [[() => {}], [], [null, 5, {}, "f"]],
};

test("serve() listens on port 9000 of all interfaces by default", () => {
  const { listen } = Deno;
  const given: unknown[] = [];
  try {
    Deno.listen = (options: unknown) => {
      given.push(options);
      throw REASON; // before a port is taken that another program may have
    };
    assertThrows(() => serve(), Error, "enough");
  } finally {
    Deno.listen = listen;
  }
  const { hostname, port, tcpBacklog, reusePort } = NO_FLAGS;
  assertEquals(given, [{ hostname, port, tcpBacklog, reusePort }]);
  return Promise.resolve();
});

test("serve() takes every good option, and undefined for the default", async () => {
  const signal = AbortSignal.abort(REASON); // thrown when all are checked
  for (const [name, [good]] of Object.entries(OPTIONS)) {
    for (const value of name === "signal" ? good : [undefined, ...good]) {
      const options = { signal, [name]: value };
      assertThrows(() => serve(options), Error, "enough", name);
    }
  }
  const names = Object.keys(OPTIONS);
  const defaults = Object.fromEntries(names.map((name) => [name, undefined]));
  await using server = serve({ ...defaults, port: 0 });
  assertEquals(server.addr.hostname, "0.0.0.0");
  await assertGreets(server);
});

test("serve() names a bad option and opens nothing", async () => {
  // A server that got as far as listening would find the port in use.
  await using server = start().server;
  const { hostname, port } = server.addr;
  function assertNamed(options: unknown, kind: unknown, name: string) {
    const error = assertThrows(() => serve(options as ServeOptions)) as Error;
    assertEquals(error.constructor, kind, `${name}: ${error}`);
    assertMatch(error.message, new RegExp(`^${name} must be an? .*, not .+$`));
  }
  for (const [name, [_, wrongRange, wrongType]] of Object.entries(OPTIONS)) {
    for (const value of [...wrongRange, ...wrongType]) {
      const kind = wrongRange.includes(value) ? RangeError : TypeError;
      assertNamed({ hostname, port, [name]: value }, kind, name);
    }
  }
  for (const options of [null, port, "x", () => {}]) {
    assertNamed(options, TypeError, "options");
  }
  const shown = [[null, "null"], [5, "5"], [{}, "an object"]];
  for (const [value, text] of [...shown, [() => 5, "a function"]]) {
    const message = `hostname must be a string, not ${text}`;
    const options = { port, hostname: value as string };
    assertThrows(() => serve(options), TypeError, message);
  }
});

// ================================ parseFlags() ================================

const NO_FLAGS = {
  hostname: "0.0.0.0",
  port: 9000,
  greeting: GREETING,
  tcpBacklog: 65535,
  timeout: 5000,
  maxConnections: 10000,
  reusePort: false,
  answer: false,
  verbose: false,
  help: false,
  version: false,
};

test("parseFlags() takes long and short flags, and the last of a repeated one", async () => {
  const cases: [Partial<typeof NO_FLAGS>, ...string[]][] = [
    [{}, ""],
    [{ port: 0 }, "--port=0"],
    [{ port: 80 }, "--port 80", "-p 80", "-p80", "-p=80", "-p 1 --port 80"],
    [{ port: 65535 }, "-p 65535"],
    [{ hostname: "::1" }, "--hostname ::1", "-H ::1", "-H=::1"],
    [{ hostname: "a=b" }, "--hostname=a=b", "-H a=b", "-H=a=b"],
    [{ greeting: "Hi\n" }, "--greeting Hi", "-g Hi", "-gHi", "-g=Hi", "-gHi\n"],
    [{ greeting: "-" }, "--greeting=-", "-g=-", "-g -", "-g-"],
    [{ greeting: "-v\n" }, "--greeting=-v", "-g=-v"],
    [{ greeting: "a=b\n" }, "-g a=b", "-ga=b", "-g=a=b", "--greeting=a=b"],
    [{ greeting: "=\n" }, "-g==", "--greeting=="],
    [{ greeting: "a\nb\n" }, "-g a\nb", "-ga\nb", "-g=a\nb", "--greeting=a\nb"],
    [{ greeting: "\n" }, "-g \n", "-g\n", "-g=\n", "--greeting=\n"],
    [{ greeting: "\r\u2028\n" }, "-g\r\u2028", "-g=\r\u2028"],
    [{ greeting: "5\n" }, "--greeting 5", "-g5"],
    [{ tcpBacklog: 1 }, "--backlog 1", "-b1", "-b=1"],
    [{ tcpBacklog: MAX }, `-b ${MAX}`],
    [{ timeout: 2000 }, "--timeout 2", "-t2", "-t=2", "-t 2.0"],
    [{ timeout: 500 }, "-t .5", "-t0.5"],
    [{ timeout: 1 }, "-t 0.001"],
    [{ timeout: 1002 }, "-t 1.0015"],
    [{ timeout: 2147483000 }, "-t 2147483"],
    [{ maxConnections: 7 }, "--max-connections 7", "-c 7", "-c=7"],
    [{ maxConnections: MAX }, `-c ${MAX}`],
    [{ reusePort: true }, "--reuse-port", "-r"],
    [{ answer: true }, "--answer", "-a"],
    [{ verbose: true }, "--verbose", "-v"],
    [{ reusePort: true, answer: true, port: 80 }, "-ra -p 80"],
    [{ help: true }, "--help", "-h"],
    [{ version: true }, "--version", "-V"],
  ];
  for (const [expected, ...lines] of cases) {
    for (const line of lines) {
      const flags = await parseFlags(line === "" ? [] : line.split(" "));
      assertEquals(flags, { ...NO_FLAGS, ...expected }, line);
    }
  }
});

/** What is said, and command lines of which it is: words with a | between them. */
const BAD_COMMAND_LINES: [string, ...string[]][] = [
  [`unknown flag "--prot"`, "--prot|80"],
  [`unknown flag "--no-port"`, "--no-port"],
  [`unknown flag "-x"`, "-x"],
  [`unknown flag "--port.x=5"`, "--port.x=5"],
  [`unknown flag "--__proto__=5"`, "--__proto__=5"],
  [`stray word "9000"`, "9000", "--|9000"],
  [`stray word ""`, ""],
  [`stray word "-"`, "-"],
  [String.raw`stray word "two\nlines"`, "two\nlines"],
];

// The same mistakes in every flag of a kind.
const VALUES = "port-p hostname-H greeting-g backlog-b timeout-t connections-c";
for (const [flag, letter] of VALUES.split(" ").map((pair) => pair.split("-"))) {
  const long = flag === "connections" ? "--max-connections" : `--${flag}`;
  const lines = `${long} ${long}= ${long}| ${long}|-1 -${letter} -${letter}=`;
  BAD_COMMAND_LINES.push([`${long} needs a value`, ...lines.split(" ")]);
}
for (const flag of ["reuse-port", "answer", "verbose", "help", "Version"]) {
  const [long, short] = [`--${flag.toLowerCase()}`, `-${flag[0]}`];
  const message = `${long} takes no value, and was given "no"`;
  BAD_COMMAND_LINES.push([message, `${long}=no`, `${short}|no`, `${short}=no`]);
}
const noNumbers = "-1 +1 0x10 0b1 1e3 x - ١ 1_0 Infinity NaN 80x 1.".split(" ");
for (
  const [flag, letter, rule, bad] of [
    ["port", "p", "whole number from 0 to 65535", "65536 1.5 .5"],
    ["backlog", "b", `whole number from 1 to ${MAX}`, "0 2147483648 1.5"],
    ["max-connections", "c", `whole number from 1 to ${MAX}`, "0 1e9 1.5"],
    ["timeout", "t", "number from 0.001 to 2147483", "0 0.0 2147484 . 1,5"],
  ] as const
) {
  for (const value of [...noNumbers, ...bad.split(" "), " 80", "80 ", "1\n"]) {
    const message = `--${flag} must be a ${rule}, not ${JSON.stringify(value)}`;
    BAD_COMMAND_LINES.push([message, `--${flag}=${value}`]);
    BAD_COMMAND_LINES.push([message, `-${letter}=${value}`]);
  }
}

test("parseFlags() names what is wrong, in one line", async () => {
  for (const [message, ...lines] of BAD_COMMAND_LINES) {
    for (const line of lines) {
      const args = line.split("|");
      const error = await assertRejects(() => parseFlags(args)) as Error;
      assertStringIncludes(error.message, message, line);
      assertMatch(error.message, /^[^\n]+$/);
    }
  }
});

test("parseFlags() gives valid options or one line for any arguments", async () => {
  const pieces =
    "--port -p --hostname= -H --greeting -g= --timeout -t0 --answer -a -vh " +
    "--no-port --_ --__proto__ --constructor --port.a -- - = 0 80 1.5 true null ☎ ::1";
  const all = [...pieces.split(" "), "", " ", "\n", "\0"];
  const pick = () => all[Math.floor(Math.random() * all.length)]!;
  const signal = AbortSignal.abort(REASON); // thrown when the options are checked
  let parsed = 0;
  for (let i = 0; i < 10_000; i++) {
    const args = Array.from(
      { length: i % 5 },
      () => pick() + (i % 3 ? "" : pick()),
    );
    const flags = await parseFlags(args).catch((error: Error) => {
      assertMatch(error.message, /^[^\n]+$/);
      assert(!(error instanceof TypeError)); // for a package that is missing
    });
    if (!flags) continue;
    parsed++;
    assertThrows(() => serve({ ...flags, signal }), Error, "enough");
  }
  assertGreater(parsed, 2000);
});

// =========================== The command line: tools ===========================

/** A test of server.ts as a process. */
function it(name: string, fn: () => Promise<void>, ignore = false): void {
  test(`server.ts ${name}`, fn, ignore || !hasProcesses);
}

/** Runs a shell script to its end, with `args` as its "$@". */
async function sh(script: string, ...args: string[]) {
  const command = ["-c", script, "sh", ...args];
  const run = await new Deno.Command("sh", { args: command }).output();
  const [out, err] = [decode(run.stdout), decode(run.stderr)];
  return { code: run.code, stdout: run.stdout, out, err };
}

/** Starts the command line, on a free port of 127.0.0.1 unless `args` differ. */
async function launch(
  args: string[] = [],
  { stdin = new Uint8Array(), limit = "", permission = "--allow-net" } = {},
) {
  const command = [...denoRun([permission]), "-H127.0.0.1", "-p0", ...args];
  const child = new Deno.Command("sh", {
    args: ["-c", `${limit} exec "$@"`, "sh", ...command],
    stdin: "piped",
    stderr: "piped",
  }).spawn();
  const log = watch(child.stderr);
  await new Blob([stdin]).stream().pipeTo(child.stdin);
  const [, address, port, nc = ""] = await log.line(
    /^Listening on (.*):(\d+) \(try: (nc .*)\)$/,
  );
  return {
    ...log,
    pid: child.pid,
    address,
    /** The command of a client, as the server suggests it. */
    nc,
    connect: () => Deno.connect({ hostname: "127.0.0.1", port: Number(port) }),
    kill: (signal: Deno.Signal) => child.kill(signal),
    /** Waits for the end: how it ended, and its last line. */
    async ended() {
      const { code, signal } = await child.status;
      await log.end;
      return { code, signal, last: log.lines().at(-1) };
    },
    stop(signal: Deno.Signal = "SIGTERM") {
      child.kill(signal);
      return this.ended();
    },
  };
}

/** How a server ends that was stopped. */
function stopped(greeted: number, failed = 0) {
  const last = `Stopped: ${greeted} greeted, ${failed} failed`;
  return { code: 0, signal: null, last };
}

// ===================== The command line: what it is told =====================

it("greets nc, and stops on SIGINT, SIGTERM and SIGHUP", async () => {
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    const server = await launch();
    assertEquals((await sh(`${server.nc} </dev/null`)).out, GREETING);
    const talking = await sh(`echo Hello from nc | ${server.nc}`);
    assertEquals(talking.out, GREETING);
    assertEquals(await server.stop(signal), stopped(2));
  }
});

it("prints no line for a client, and none for a stop without clients", async () => {
  const server = await launch(["--timeout=0.1", "--answer"]);
  assertEquals((await sh(`echo Hello | ${server.nc}`)).out, GREETING);
  assertEquals(await receiveText(await server.connect()), ""); // cut off
  assertEquals(await within(450, server.stop()), stopped(1, 1)); // at once
  assertEquals(server.lines().length, 2); // Listening and Stopped
});

for (
  const [host, ...expected] of [
    ["0.0.0.0", "0.0.0.0 127.0.0.1"],
    ["127.0.0.2", "127.0.0.2 127.0.0.2"],
    ["localhost", "127.0.0.1 127.0.0.1", "[::1] ::1"],
    ["::", "[::] ::1"],
    ["::1", "[::1] ::1"],
  ] as [string, ...string[]][]
) {
  it(
    `shows how to reach it on ${host}, with a command that works`,
    async () => {
      const server = await launch(["--hostname", host]);
      const shown = `${server.address} ${server.nc.split(" ")[1]}`;
      assert(expected.includes(shown), shown);
      assertEquals((await sh(`${server.nc} </dev/null`)).out, GREETING);
      assertEquals(await server.stop(), stopped(1));
    },
    host.includes(":") && !hasIPv6,
  );
}

/** A link-local IPv6 address of this machine, with its zone. */
const linkLocal = hasProcesses
  ? (await sh(`awk '/^fe80/ { print $1, $6; exit }' /proc/net/if_inet6`)).out
    .replace(
      /^(.{32}) (.+)\n/,
      (_, address, zone) => `${address.match(/..../g).join(":")}%${zone}`,
    )
  : "";

it("shows the zone of a link-local IPv6 address", async () => {
  for (const host of [linkLocal, `[${linkLocal}]`]) {
    const server = await launch(["--hostname", host]);
    assertEquals((await sh(`${server.nc} </dev/null`)).out, GREETING);
    assertMatch(server.address!, /^\[fe80::[^\]]+%[^\]]+\]$/);
    assertEquals(await server.stop(), stopped(1));
  }
}, linkLocal === "");

for (
  const [what, flag, input, expected] of [
    ["a greeting, and adds a newline", "-g=Hi there", "", "Hi there\n"],
    ["a greeting that has its newline", "--greeting=☎\n", "", "☎\n"],
    ["standard input as it is", "-g-", "220 ready\r\n", "220 ready\r\n"],
    ["20 MiB of standard input", "-g-", LARGE, LARGE],
  ] as const
) {
  it(`sends ${what}`, async () => {
    const [stdin, bytes] = [input, expected].map((value) =>
      typeof value === "string" ? new TextEncoder().encode(value) : value
    ) as [Uint8Array<ArrayBuffer>, Uint8Array];
    const server = await launch([flag], { stdin });
    const { stdout } = await sh(`${server.nc} </dev/null`);
    assert(equals(stdout, bytes));
    assertEquals(await server.stop(), stopped(1));
  });
}

it("waits for the client to speak with --answer", async () => {
  const server = await launch(["--answer"]);
  using silent = await server.connect();
  assertEquals((await sh(`echo Hello | ${server.nc}`)).out, GREETING);
  assertEquals((await sh(`${server.nc} -N </dev/null`)).out, GREETING);
  await silent.write(new Uint8Array(1));
  await assertAllGreeted([silent]);
  assertEquals(await server.stop(), stopped(3));
});

it("holds no more connections than --max-connections", async () => {
  const server = await launch(["--answer", "--max-connections=1"]);
  const silent = await server.connect();
  const next = await server.connect();
  await send(next, 1);
  let greeted = false;
  const text = receiveText(next).finally(() => greeted = true);
  await sleep(200);
  assertEquals(greeted, false);
  silent.close();
  assertEquals(await text, GREETING);
  assertEquals(await server.stop(), stopped(2));
});

it("prints a line for every connection with --verbose", async () => {
  const args = ["-v", "--timeout=1", "--greeting=-"];
  const server = await launch(args, { stdin: LARGE });
  const good = await server.connect();
  await receive(good);
  const stuck = await server.connect();
  async function figures(conn: Deno.Conn, how: string) {
    const { port } = conn.localAddr as Deno.NetAddr;
    const line =
      `^127\\.0\\.0\\.1:${port} ${how}: (\\d+) bytes, (\\d+\\.\\d) ms$`;
    return (await server.line(new RegExp(line))).slice(1).map(Number);
  }
  const [bytes, milliseconds] = await figures(good, "greeted");
  assertEquals(bytes, LARGE.length);
  assertLess(milliseconds!, 1000);
  const [sent, after] = await figures(stuck, "failed, not greeted in 1000 ms");
  assertEquals((await receive(stuck)).length, sent);
  assert(1000 <= after! && after! < 3000, `${after} ms`);
  assertEquals(await server.stop(), stopped(1, 1));
});

it("shows the address of an IPv6 client in brackets", async () => {
  const server = await launch(["-v", "--hostname=::1"]);
  assertEquals((await sh(`${server.nc} </dev/null`)).out, GREETING);
  await server.line(/^\[::1\]:\d+ greeted: 18 bytes, /);
  assertEquals(await server.stop(), stopped(1));
}, !hasIPv6);

// What is wrong, the exit code, the arguments of `deno run`, and a part of the line.
// One row for each kind of mistake in a flag: the tests of parseFlags() have them all.
const MISTAKES = String.raw`
a bad value | 2 | server.ts -p 1.5 | --port must be a whole
a missing value | 2 | server.ts --port= | --port needs a value
an unknown flag | 2 | server.ts --bogus | unknown flag "--bogus"
a stray word | 2 | server.ts "$(printf 'a\nb')" | stray word "a\nb"
a port in use | 1 | --allow-net server.ts -p TAKEN | on 0.0.0.0:TAKEN: Address already in use
the address of another machine | 1 | --allow-net server.ts -H 203.0.113.1 -p TAKEN | on 203.0.113.1:TAKEN: Cannot assign
a name without an address | 1 | --allow-net server.ts -H no.invalid -p TAKEN | on no.invalid:TAKEN: failed to lookup
two lines for a host | 1 | --allow-net server.ts -H "$(printf 'a\nb')" -p TAKEN | on a b:TAKEN: invalid
no permission | 1 | server.ts | run again with the --allow-net flag
no permission for a host in brackets | 1 | server.ts -H '[::1]' | on [::1]:9000: Requires net access
control characters in a host | 1 | --allow-net server.ts -H "$(printf '\033]0;x\007\302\233\342\200\256')" -p TAKEN | on \u{1b}]0;x\u{7}\u{9b}\u{202e}:TAKEN: invalid
control characters in a word | 2 | server.ts "$(printf '\033]0;x\007\302\233\342\200\256')" | stray word "\u001b]0;x\u0007\u{9b}\u{202e}"
a permission for another address | 1 | --allow-net=0.0.0.0 server.ts -H ::1 -p TAKEN | on [::1]:TAKEN: Requires net access
empty standard input | 1 | server.ts --greeting=- </dev/null | read standard input: it is empty
a folder as standard input | 1 | server.ts --greeting=- </ | read standard input: Is a directory
a full disk for the help | 1 | server.ts --help >/dev/full | write to standard output: No space left
`;

for (const row of MISTAKES.trim().split("\n")) {
  const [what, code, command, line] = row.split(" | ") as [
    string,
    string,
    string,
    string,
  ];
  it(`says what is wrong with ${what} in one line, with exit code ${code}`, async () => {
    // A server that got as far as listening would find the port in use.
    using listener = Deno.listen({ port: 0 });
    const taken = `${(listener.addr as Deno.NetAddr).port}`;
    const run = await sh(
      `cd "$1" && exec "$2" run --no-prompt ${command.replace("TAKEN", taken)}`,
      import.meta.dirname!,
      Deno.execPath(),
    );
    assertEquals([run.code, run.out], [Number(code), ""], run.err);
    assertMatch(
      run.err,
      code === "2" ? /^.+ \(see --help\)\n$/ : /^Cannot .+\n$/,
    );
    assertMatch(run.err, /^[^\p{Cc}\p{Cf}]+\n$/u);
    assertStringIncludes(run.err, line.replace("TAKEN", taken));
  });
}

it("hands the backlog to the kernel, which cuts it down to its maximum", async () => {
  const maximum = await sh("cat /proc/sys/net/core/somaxconn");
  const cases: [string[], number][] = [
    [[], Math.min(65535, Number(maximum.out))],
    [["--backlog=7"], 7],
  ];
  for (const [args, expected] of cases) {
    const server = await launch(args);
    const port = server.nc.split(" ").at(-1);
    const { out } = await sh(`ss -Hltn "sport = :${port}"`);
    assertEquals(out.split(/\s+/)[2], `${expected}`, out); // the column Send-Q
    assertEquals(await server.stop(), stopped(0));
  }
});

/** With Docker's default no port is privileged. */
const hasPrivilegedPorts = hasProcesses &&
  Number((await sh("cat /proc/sys/net/ipv4/ip_unprivileged_port_start")).out) >
    1;

it("says that a port is privileged", async () => {
  const { code, err } = await sh(
    '[ "$(id -u)" = 0 ] && without="setpriv --bounding-set=-net_bind_service"; exec $without "$@"',
    ...denoRun(),
    "-p1",
  );
  assertEquals(code, 1);
  assertMatch(err, /^Cannot listen on 0\.0\.0\.0:1: Permission denied.*\n$/);
}, !hasPrivilegedPorts);

it("prints help and version to standard output, without any permission", async () => {
  const help = await sh('exec "$@"', ...denoRun([]), "--help");
  assertEquals([help.code, help.err], [0, ""]);
  assert(readme.includes(`\`\`\`\n${help.out}\`\`\`\n`), help.out);
  const version = await sh('exec "$@"', ...denoRun([]), "-V");
  assertEquals([version.code, version.err], [0, ""]);
  assertEquals(version.out, `${config.name} ${config.version}\n`);
});

it("needs no more permission than its own address", async () => {
  const permission = "--allow-net=0.0.0.0:0";
  const server = await launch(["-H", "0.0.0.0"], { permission });
  assertEquals((await sh(`${server.nc} </dev/null`)).out, GREETING);
  assertEquals(await server.stop(), stopped(1));
});

// ============ In other projects, and as a lone copy: import and run ============

/** Runs a script in a new folder, with deno as "$1" and server.ts as "$2". */
function inNewFolder(script: string, ...args: string[]) {
  const all = [Deno.execPath(), SERVER, ...args];
  return sh(
    `dir=$(mktemp -d) && trap 'rm -r "$dir"' EXIT && cd "$dir" && ${script}`,
    ...all,
  );
}

it("is imported by path, or copied, under the strictest compiler options", async () => {
  const strictest = "erasableSyntaxOnly exactOptionalPropertyTypes strict " +
    "isolatedDeclarations noFallthroughCasesInSwitch noImplicitOverride " +
    "noImplicitReturns noPropertyAccessFromIndexSignature noUnusedLocals " +
    "noUncheckedIndexedAccess noUnusedParameters verbatimModuleSyntax";
  const compilerOptions = {
    ...Object.fromEntries(strictest.split(" ").map((option) => [option, true])),
    // Without deno.unstable.
    lib: ["dom", "dom.iterable", "dom.asynciterable", "deno.ns", "esnext"],
  };
  const program = (from: string) =>
    `import { serve } from "${from}";
await using server = serve({ hostname: "127.0.0.1", port: 0 });
const conn = await Deno.connect({ port: server.addr.port });
console.log(await new Response(conn.readable).text());`;
  const { code, out, err } = await inNewFolder(
    `cp "$2" . && printf %s "$3" >path.ts && printf %s "$4" >copy.ts &&
    echo "$5" >deno.json && "$1" check server.ts path.ts copy.ts &&
    "$1" run --allow-net path.ts && "$1" run --allow-net copy.ts`,
    program(SERVER),
    program("./server.ts"),
    JSON.stringify({ compilerOptions }),
  );
  assertEquals([code, out], [0, `${GREETING}\n`.repeat(2)], err);
});

it("runs, and is tested, beside a package.json", async () => {
  const { code, out, err } = await inNewFolder(
    `folder=$(dirname "$2") && cp "$folder"/deno.* "$folder"/*.ts "$folder"/README.md . &&
    echo '{ "name": "x" }' >package.json &&
    "$1" run --allow-net server.ts --version &&
    "$1" test --no-check --allow-net --filter='closes the connection'`,
  );
  assertEquals(code, 0, out + err);
});

it("has programs in the README that type-check", async () => {
  const programs = [...readme.matchAll(/^```ts ignore\n([^]*?)^```/gm)];
  assertGreater(programs.length, 0);
  for (const [, program] of programs) {
    const { code, err } = await inNewFolder(
      `printf '%s\nexport {};' "$3" >program.ts && "$1" check program.ts`,
      program!,
    );
    assertEquals(code, 0, err);
  }
});

it("says in one line that a lone copy lacks @std/cli, with exit code 1", async () => {
  for (const flag of ["--port=0", "--help"]) {
    const { code, out, err } = await inNewFolder(
      'cp "$2" . && "$1" run --no-prompt --allow-net server.ts "$3"',
      flag,
    );
    assertEquals([code, out], [1, ""], err);
    assertMatch(err, /^Cannot load @std\/cli\/parse-args: .+\n$/);
  }
});

// ======================= The command line: how it stops =======================

it("lets open connections end when told to stop, and says how many it waits for", async () => {
  const server = await launch(["--timeout=20", "--answer"]);
  const conns = await times(3, server.connect);
  for (const conn of conns) await send(conn, 1);
  for (const conn of conns) await conn.read(new Uint8Array(100));
  const began = performance.now();
  conns.pop()!.close();
  await sleep(100); // the server has seen that it left
  server.kill("SIGINT");
  await server.line(
    /^Stopping: waiting for clients \(2 left\); a second signal ends it$/,
  );
  await sleep(200);
  server.kill("SIGINT"); // so soon it is the same one, as under deno task
  assertEquals(await server.ended(), stopped(3));
  assertLess(performance.now() - began, 10_000); // the timeout has not come
  conns.forEach((conn) => conn.close());
});

for (
  const [second, exitCode] of [
    ["SIGINT", 130],
    ["SIGTERM", 143],
    ["SIGHUP", 129],
  ] as const
) {
  it(`is ended by a second signal as any process: ${second}`, async () => {
    const args = ["--timeout=1000", "--greeting=-"];
    const server = await launch(args, { stdin: LARGE });
    using conn = await server.connect();
    await conn.read(new Uint8Array(100));
    server.kill("SIGTERM");
    await server.line(/^Stopping/);
    let over = false;
    const ended = server.ended().finally(() => over = true);
    const killed = (async () => {
      while (!over) { // it takes a second one from half a second later on
        server.kill(second);
        await sleep(100);
      }
    })();
    const { code, signal, last } = await within(1500, ended);
    assertEquals([code, signal], [exitCode, second]);
    assertMatch(last!, /^Stopping/);
    await killed;
  });
}

/** Runs a command on a terminal of its own. */
function onTerminal(command: string) {
  const child = new Deno.Command("setpriv", {
    args: ["--pdeathsig=KILL", "script", "-qec", command, "/dev/null"],
    cwd: import.meta.dirname,
    stdin: "piped",
    stdout: "piped",
  }).spawn();
  const screen = watch(child.stdout);
  const keyboard = child.stdin.getWriter();
  return {
    line: screen.line,
    type: (text: string) => keyboard.write(new TextEncoder().encode(text)),
    async end() {
      await keyboard.close();
      await Promise.all([child.status, screen.end]);
    },
  };
}

const CTRL_C = "\x03";

it("takes one Ctrl-C for one, under deno task too", async () => {
  const size = 20_000_000;
  const terminal = onTerminal(
    `head -c ${size} /dev/zero | "${Deno.execPath()}" task start -p0 -g-`,
  );
  const [, port] = await terminal.line(/^Listening on 0\.0\.0\.0:(\d+) /);
  const conn = await Deno.connect({ port: Number(port) });
  assertEquals(await conn.read(new Uint8Array(1)), 1);
  await terminal.type(CTRL_C);
  await terminal.line(/Stopping: /);
  assertEquals((await receive(conn)).length, size - 1);
  await terminal.line(/^Stopped: 1 greeted, 0 failed$/);
  await terminal.end();
});

it("says when it reads the greeting from a terminal", async () => {
  const terminal = onTerminal(`"${denoRun().join('" "')}" -p0 -g-`);
  await terminal.line(
    /^Reading the greeting from the terminal; end it with Ctrl-D$/,
  );
  await terminal.type("Hello\n\x04");
  const [, port] = await terminal.line(/^Listening on 0\.0\.0\.0:(\d+) /);
  const conn = await Deno.connect({ port: Number(port) });
  assertEquals(await receiveText(conn), "Hello\n");
  await terminal.type(CTRL_C);
  await terminal.line(/Stopped: 1 greeted, 0 failed$/);
  await terminal.end();
});

for (const others of ["nobody", "3,000 that send", "3,000 that leave"]) {
  it(`greets the clients in the queue behind ${others}, and then stops`, async () => {
    const server = await launch(["--timeout=20"]);
    const size = others === "nobody" ? 1 : 3000; // one, for it to be awake
    const conns = await inTurn(size, server.connect);
    for (const conn of conns) await conn.read(new Uint8Array(100));
    server.kill("SIGSTOP");
    for (const conn of conns) {
      if (others.endsWith("send")) await conn.write(new Uint8Array(100));
      else conn.close();
    }
    const waiting = await inTurn(500, server.connect);
    server.kill("SIGCONT");
    server.kill("SIGTERM");
    await assertAllGreeted(waiting);
    if (others.endsWith("send")) conns.forEach((conn) => conn.close());
    assertEquals(await server.ended(), stopped(size + 500));
    await assertRejects(server.connect, Deno.errors.ConnectionRefused);
  });
}

it("cuts nobody off for time in which it was suspended itself", async () => {
  const args = ["--timeout=1", "--greeting=-"];
  const server = await launch(args, { stdin: LARGE });
  const conn = await server.connect();
  await conn.read(new Uint8Array(1));
  server.kill("SIGSTOP");
  await sleep(1500);
  server.kill("SIGCONT");
  assertEquals((await receive(conn)).length, LARGE.length - 1);
  assertEquals(await server.stop(), stopped(1));
});

/** Clients that come again and again, `size` of them at once. */
function crowd(size: number, connect: () => Promise<Deno.Conn>) {
  /** What they were sent, and how often; no entry for being turned away. */
  const sent: Record<string, number> = {};
  const open = new Set<Deno.Conn>();
  let going = true;
  async function client() {
    const buffer = new Uint8Array(100);
    while (going) {
      let text = "";
      try {
        using conn = await connect();
        open.add(conn);
        for (let n; (n = await conn.read(buffer)) !== null;) {
          text += decode(buffer.subarray(0, n));
        }
        open.delete(conn);
      } catch {
        // Refused, or reset in the queue; but not in the midst of a greeting.
        if (text === "") continue;
      }
      sent[text] = (sent[text] ?? 0) + 1;
    }
  }
  const clients = times(size, client);
  return {
    sent,
    /**
     * Ends it, when all servers have ended. The kernel may have forgotten a client
     * that came as a listener was closed: that one would wait for ever.
     */
    async leave() {
      going = false;
      const late = setTimeout(() => {
        for (const conn of open) conn[Symbol.dispose]();
      }, 2000);
      await clients;
      clearTimeout(late);
    },
  };
}

/** A server ended well, and counted no fewer than its clients did. */
function assertLostNobody(end: { code: number; last?: string }, sent = NaN) {
  const count = /^Stopped: (\d+) greeted, 0 failed$/.exec(end.last!);
  assertGreaterOrEqual(Number(count?.[1]), sent);
  assertEquals(end.code, 0);
}

it("loses no accepted client when it is stopped under load", async () => {
  const server = await launch(["--timeout=1"]); // bounds the stop, too
  const { sent, leave } = crowd(64, server.connect);
  await until(() => sent[GREETING]! > 2000);
  const end = await server.stop();
  await leave();
  assertEquals(Object.keys(sent), [GREETING]);
  assertLostNobody(end, sent[GREETING]);
});

it("shares a port between processes with --reuse-port", async () => {
  const args = ["--reuse-port", "--timeout=1"];
  const first = await launch([...args, "--greeting=first"]);
  const port = first.nc.split(" ").at(-1);
  const second = await launch([...args, "--greeting=second", `--port=${port}`]);
  const { sent, leave } = crowd(32, first.connect);
  await until(() => sent["first\n"]! > 100 && sent["second\n"]! > 100);
  const firstEnd = await first.stop(); // in their midst
  const before = sent["second\n"]!;
  await until(() => sent["second\n"]! > before + 100);
  const secondEnd = await second.stop();
  await leave();
  assertEquals(Object.keys(sent).sort(), ["first\n", "second\n"]);
  assertLostNobody(firstEnd, sent["first\n"]);
  assertLostNobody(secondEnd, sent["second\n"]);
});

// ============== The command line: descriptors, sockets and CPU ==============

it("greets all without free file descriptors, though they stay and it is told to stop", async () => {
  const server = await launch(["--timeout=20"], { limit: "ulimit -n 64;" });
  const conns = await times(100, server.connect);
  const began = performance.now();
  await server.line(/^Cannot accept, trying again: Too many open files/);
  server.kill("SIGTERM");
  for (const conn of conns) { // they read, but never close
    assertEquals(await conn.read(new Uint8Array(100)), GREETING.length);
  }
  assertEquals(await server.ended(), stopped(100));
  conns.forEach((conn) => conn.close());
  const complaints = server.lines().filter((line) => /^Cannot/.test(line));
  // One a second. The first clients leave their places after more than a second.
  assertGreater(complaints.length, 1);
  assertLess(complaints.length, 2 + (performance.now() - began) / 1000);
});

it("says at once that it is out of file descriptors, even if that is over at once", async () => {
  const server = await launch([], { limit: "ulimit -n 64;" });
  await assertAllGreeted(await times(100, server.connect));
  assertEquals(await server.stop(), stopped(100));
  const complaints = server.lines().filter((line) => /^Cannot/.test(line));
  assertEquals(complaints.length, 1);
});

it("gives every socket back", async () => {
  const args = ["--timeout=1000", "--greeting=-"];
  const server = await launch(args, { stdin: LARGE });
  const count = async () => {
    const { out } = await sh(`ls -l /proc/${server.pid}/fd | grep -c socket:`);
    return Number(out);
  };
  const idle = await count();
  for (let i = 0; i < 2; i++) {
    const conns = await times(300, server.connect);
    while (await count() !== idle + 300);
    conns.forEach((conn) => conn.close());
    while (await count() !== idle);
  }
  assertEquals((await server.stop()).code, 0);
});

it("does not wake up while no client is connected", async () => {
  const server = await launch(["--timeout=0.1"]); // so a tick would be 25 ms
  await assertAllGreeted([await server.connect()]);
  const wakeUps = async () => {
    const file = `/proc/${server.pid}/status`;
    return (await sh(`awk '/^voluntary_ctxt/ { print $2 }' ${file}`)).out;
  };
  let before: string;
  do {
    before = await wakeUps();
    await sleep(300);
  } while (await wakeUps() !== before);
  assertMatch(before, /^\d+\n$/);
  assertEquals(await server.stop(), stopped(1));
});

// ========================= The command line: its log =========================

/** Greets `count` clients, 50 at once. */
async function greetMany(connect: () => Promise<Deno.Conn>, count: number) {
  for (let i = 0; i < count; i += 50) {
    await assertAllGreeted(await times(50, connect));
  }
}

it("writes every line of a log that is read", async () => {
  const server = await launch(["--verbose"]);
  await greetMany(server.connect, 3000);
  assertEquals(await server.stop(), stopped(3000));
  const greeted = server.lines().filter((line) => / greeted: 18 /.test(line));
  assertEquals(greeted.length, 3000);
});

/**
 * Starts the command line with --verbose, and leaves it to the test whether and
 * when its log is read. So the port has to be known without the log.
 */
async function launchUnread(script = 'exec "$@"') {
  const listener = Deno.listen({ port: 0 }); // one that was free a moment ago
  const { port } = listener.addr as Deno.NetAddr;
  listener.close();
  const command = [...denoRun(), "--verbose", `--port=${port}`];
  const child = new Deno.Command("sh", {
    args: ["-c", script, "sh", ...command],
    stderr: "piped",
  }).spawn();
  const connect = () => Deno.connect({ port });
  let conn: Deno.Conn | undefined;
  while (!conn) conn = await connect().catch(() => undefined);
  await assertAllGreeted([conn]);
  async function stop() {
    child.kill("SIGTERM");
    assertEquals((await child.status).code, 0);
  }
  /** The CPU time that it has used, in hundredths of a second. */
  async function cpu() {
    const { out } = await sh(
      `awk '{ print $14 + $15 }' /proc/${child.pid}/stat`,
    );
    return Number(out);
  }
  return { stderr: child.stderr, connect, stop, cpu };
}

for (
  const [log, script] of [
    ["is closed", 'exec "$@" 2>&-'],
    ["is a full disk", 'exec "$@" 2>/dev/full'],
    ["has lost its reader", 'exec "$@"'],
    ["is not read", 'exec "$@"'],
  ] as const
) {
  it(`greets on while its log ${log}, and stops within a second`, async () => {
    const server = await launchUnread(script);
    if (log === "has lost its reader") await server.stderr.cancel();
    await greetMany(server.connect, 3000);
    await within(1000, server.stop());
    await server.stderr.cancel();
  });
}

it("waits at the end for the reader of its log, for a moment", async () => {
  const server = await launchUnread();
  await greetMany(server.connect, 3000);
  const stop = server.stop();
  await sleep(250); // half of the time that it waits
  const { lines, end } = watch(server.stderr);
  await stop;
  await end;
  assertEquals(lines().at(-1), "Stopped: 3001 greeted, 0 failed");
});

it("writes every line of a log that is read late, where that is non-blocking, and rests meanwhile", async () => {
  const server = await launchUnread(
    `exec perl -MFcntl -e 'fcntl(STDERR, F_SETFL, O_WRONLY | O_NONBLOCK); exec @ARGV' "$@"`,
  );
  await greetMany(server.connect, 3000);
  let before: number, after = await server.cpu();
  do { // until it has nothing to do but wait for the reader
    before = after;
    await sleep(300);
    after = await server.cpu();
  } while (after - before > 3);
  const { lines, end } = watch(server.stderr);
  await within(1000, until(() => lines().length === 3002)); // with "Listening"
  for (const line of lines().slice(1)) {
    assertMatch(line, /^127\.0\.0\.1:\d+ greeted: 18 bytes, \d+\.\d ms$/);
  }
  await server.stop();
  await end;
  assertEquals(lines().at(-1), "Stopped: 3001 greeted, 0 failed");
});

it("keeps a mebibyte of a log that is not read, drops later lines, and goes on when it is read", async () => {
  const server = await launchUnread();
  await greetMany(server.connect, 30_000); // about 1.3 MB of log
  const { lines, line, end } = watch(server.stderr);
  await until(() => lines().length > 20_000);
  const last = await server.connect();
  await assertAllGreeted([last]);
  const { port } = last.localAddr as Deno.NetAddr;
  await line(new RegExp(`:${port} greeted`));
  await server.stop();
  await end;
  assertMatch(lines()[0]!, /^Listening/);
  assertEquals(lines().at(-1), "Stopped: 30002 greeted, 0 failed");
  const size = lines().join("\n").length;
  assertGreater(size, 2 ** 20);
  assertLess(size, 2 ** 20 + 200_000); // the pipe, and what was being written
});

// ================================= Benchmarks =================================

const SINK = new Uint8Array(262144);

/** The same promise as serve()'s, and nothing else: no deadline, no limits. */
async function floor(greeting: Uint8Array, listener: Deno.TcpListener) {
  async function greet(conn: Deno.TcpConn) {
    await conn.write(greeting);
    await conn.closeWrite();
    while (await conn.read(SINK) !== null);
    conn.close();
  }
  for await (const conn of listener) greet(conn);
}

for (const atOnce of [1, 64]) {
  for (
    const [name, launch] of [
      ["plain loop", () => startLoop(plainLoop)],
      ["floor", () => startLoop(floor)],
      ["serve()", () => start().server],
    ] as const
  ) {
    Deno.bench({
      name,
      group: `1000 clients, ${atOnce} at once`,
      baseline: name === "floor",
      warmup: 2,
      n: 50,
      async fn(b) {
        const server = launch();
        b.start();
        await load(server, atOnce, 1000);
        b.end();
        await server.shutdown();
      },
    });
  }
}
