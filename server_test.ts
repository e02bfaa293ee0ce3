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
import { Socket } from "node:net";
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
/** The error of some aborts and greeting functions. */
const REASON = new Error("enough");
const NEVER = new Promise<never>(() => {});

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

function connect(server: GreetingServer): Promise<Deno.TcpConn> {
  return Deno.connect({ hostname: "127.0.0.1", port: server.addr.port });
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

async function assertGreets(server: GreetingServer): Promise<void> {
  await assertAllGreeted([await connect(server)]);
}

async function assertRefuses(server: GreetingServer): Promise<void> {
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

// =========================== serve(): the greeting ===========================

test("serve() reports the address, the bytes and the time of a greeted client", async () => {
  const { server, outcomes } = start({
    async greeting() { // takes 20 ms
      const began = performance.now();
      while (performance.now() < began + 20) await sleep(1);
      return GREETING;
    },
  });
  const began = performance.now();
  const conn = await connect(server);
  assertEquals(await receiveText(conn), GREETING);
  const took = performance.now() - began;
  await server.shutdown();
  assertEquals(outcomes.length, 1);
  const { milliseconds, ...others } = outcomes[0]!;
  const [remoteAddr, bytes] = [conn.localAddr, GREETING.length];
  assertEquals(others, { remoteAddr, bytes, error: undefined } as Outcome);
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

test("serve() sends a large greeting whole to fast and slow readers, past 200 that read nothing", async () => {
  const { server, outcomes } = start({ greeting: LARGE, timeout: 60_000 });
  const stuck = await times(200, () => connect(server));
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
  assertGreaterOrEqual(server.connections, 200);
  assert(equals(fast, LARGE));
  assert(equals(await slow, LARGE));
  stuck.forEach((conn) => conn.close());
  await server.shutdown();
  const whole = outcomes.filter(({ error }) => !error);
  assertEquals(whole.map(({ bytes }) => bytes), [LARGE.length, LARGE.length]);
});

test("serve() copies a greeting of bytes", async () => {
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
});

test("serve() copies what a greeting function returns", async () => {
  const buffer = new Uint8Array(LARGE.length);
  let calls = 0;
  await using server = start({ greeting: () => buffer.fill(++calls) }).server;
  const first = await connect(server);
  await first.read(new Uint8Array(1)); // most of its greeting is not yet written
  const second = await connect(server);
  const [ones, twos] = await Promise.all([first, second].map(receive));
  assert(ones!.every((byte) => byte === 1));
  assert(twos!.every((byte) => byte === 2));
});

test("serve() calls a function for the greeting, with the client's address", async () => {
  await using server = start({
    greeting: ({ hostname, port }) => `${hostname} ${port}`,
  }).server;
  const conn = await connect(server);
  const { hostname, port } = conn.localAddr as Deno.NetAddr;
  assertEquals(await receiveText(conn), `${hostname} ${port}`);
});

test("serve() fails only the connection whose greeting function fails", async () => {
  const thrower = (thrown: unknown) => () => {
    throw thrown;
  };
  const bad: (() => Greeting | Promise<Greeting>)[] = [
    thrower(REASON),
    () => Promise.reject(REASON),
    thrower("a string"),
    thrower(undefined),
    () => 5 as unknown as string,
  ];
  const left = [...bad];
  const { server, outcomes, errors } = start({
    greeting: () => left.shift()?.() ?? GREETING,
  });
  for (const _ of bad) {
    assertEquals(await receiveText(await connect(server)), "");
  }
  await assertGreets(server);
  await server.shutdown();
  const bytes = outcomes.map(({ bytes }) => bytes);
  assertEquals(bytes, [0, 0, 0, 0, 0, GREETING.length]);
  const [first, second, string, nothing, wrong, last] = errors();
  assertEquals([first, second, last], [REASON, REASON, undefined]);
  assertEquals(string?.cause, "a string");
  assertInstanceOf(nothing, Error);
  assertMatch(wrong!.message, /greeting must be a string or a Uint8Array/);
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

// ============================ serve(): the clients ============================

for (
  const [what, act] of [
    ["sends a byte", (conn: Deno.TcpConn) => send(conn, 1)],
    ["sends 1 kB", (conn: Deno.TcpConn) => send(conn, 1000)],
    ["sends 100 kB", (conn: Deno.TcpConn) => send(conn, 100_000)],
    ["sends 20 MiB", (conn: Deno.TcpConn) => send(conn, LARGE.length)],
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
      await times(4, async () => {
        const conn = await connect(server);
        await act(conn);
        assert(equals(await receive(conn), greeting));
      });
      await server.shutdown();
      assertEquals(errors(), Array(4).fill(undefined));
    }
  });
}

test("serve() shows a client the end while the client's own half is open", async () => {
  await using server = start().server;
  using conn = await connectAndStay(server);
  assertEquals(await conn.read(new Uint8Array(1)), null);
  await conn.write(new Uint8Array(1)); // to a server that still reads
});

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

/** An error means that the other side has left. Systems name that differently. */
function assertLeft({ name }: Error): void {
  const names = "ConnectionReset ConnectionAborted BrokenPipe NotConnected";
  assert(names.split(" ").includes(name), name);
}

test("serve() takes no notice of clients that reset before they are accepted", async () => {
  const acceptErrors: Error[] = [];
  const { server, outcomes } = start({
    maxConnections: 1,
    onAcceptError: (error) => void acceptErrors.push(error),
  });
  // The first client holds the only place, the others wait in the queue.
  const first = await connectAndStay(server);
  for (let i = 0; i < 5; i++) await connectAndReset(server.addr.port);
  const last = await connect(server);
  first.close();
  await assertAllGreeted([last]);
  await server.shutdown();
  assertEquals([outcomes.length, acceptErrors.length], [2, 0]);
});

test("serve() reports a client that resets while it is written to", async () => {
  const { server, outcomes } = start({ greeting: LARGE });
  await connectAndReset(server.addr.port, 100);
  await server.shutdown();
  assertEquals(outcomes.length, 1);
  assertLess(outcomes[0]!.bytes, LARGE.length);
  assertLeft(outcomes[0]!.error!);
});

test("serve() reports a client when it is greeted, not when it closes", async () => {
  const greeted = Promise.withResolvers<Outcome>();
  await using server = start({ onOutcome: greeted.resolve }).server;
  using conn = await connect(server);
  assertEquals((await greeted.promise).remoteAddr, conn.localAddr);
  assertEquals(server.connections, 1);
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

test("serve() holds no more than maxConnections, and greets all in turn", async () => {
  let most = 0;
  const { server, outcomes } = start({
    maxConnections: 10,
    timeout: 50,
    greeting() {
      most = Math.max(most, server.connections);
      return GREETING;
    },
  });
  // They read, but never close.
  const conns = await times(100, () => connectAndStay(server));
  await server.shutdown();
  conns.forEach((conn) => conn.close());
  assertEquals([outcomes.length, most], [100, 10]);
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

test("serve() with answer cuts off a client that says nothing", async () => {
  const { server, outcomes, errors } = start({ answer: true, timeout: 100 });
  assertEquals(await receiveText(await connect(server)), "");
  await server.shutdown();
  const [{ bytes, milliseconds }] = outcomes as [Outcome];
  assertEquals([outcomes.length, bytes], [1, 0]);
  assertGreaterOrEqual(milliseconds, 100);
  assertInstanceOf(errors()[0], Deno.errors.TimedOut);
  assertEquals(errors()[0]!.message, "the client sent nothing in 100 ms");
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

test("serve() with answer is an HTTP target that fetch() accepts, 300 times", async () => {
  const greeting =
    "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nOK\n";
  const { server, errors } = start({ answer: true, greeting });
  for (let i = 0; i < 300; i++) {
    const response = await fetch(`http://127.0.0.1:${server.addr.port}/health`);
    assertEquals([response.status, await response.text()], [200, "OK\n"]);
  }
  await server.shutdown();
  assertEquals(errors(), Array(300).fill(undefined));
});

// =========================== serve(): the deadlines ===========================

test("serve() cuts off clients that read nothing, each at its timeout", async () => {
  const timeout = 400;
  const { server, outcomes } = start({ greeting: LARGE, timeout });
  const conns: Deno.Conn[] = [];
  const ends: Promise<void>[] = [];
  for (let i = 0; i < 5; i++) {
    conns.push(await connect(server));
    // At the first tick after its time: a tick is a quarter of the timeout.
    ends.push(within(timeout * 1.25 + 200, until(() => outcomes.length > i)));
    await sleep(50); // not to be in one tick
  }
  await Promise.all(ends);
  await server.shutdown();
  conns.forEach((conn) => conn.close());
  assertEquals(outcomes.length, 5);
  for (const { error, bytes, milliseconds } of outcomes) {
    assertInstanceOf(error, Deno.errors.TimedOut);
    assertLess(bytes, LARGE.length);
    assertGreaterOrEqual(milliseconds, timeout);
  }
});

test("serve() cuts off a client whose greeting function never answers", async () => {
  const late = Promise.withResolvers<string>();
  const greeting = () => late.promise;
  const { server, outcomes } = start({ timeout: 100, greeting });
  assertEquals(await receiveText(await connect(server)), "");
  late.reject(new Error("nobody waits for this any more"));
  await server.shutdown();
  assertEquals(outcomes.length, 1);
  assertInstanceOf(outcomes[0]!.error, Deno.errors.TimedOut);
  assertGreaterOrEqual(outcomes[0]!.milliseconds, 100);
});

for (const [timeout, lingers] of [[200, 200], [20_000, 1000]] as const) {
  test(`serve() lets a greeted client linger for ${lingers} ms with a timeout of ${timeout}`, async () => {
    const { server, errors } = start({
      timeout,
      maxConnections: 1,
      greeting: () => sleep(150).then(() => GREETING), // part of the timeout
    });
    using conn = await connectAndStay(server);
    const greeted = performance.now();
    // The next client has to wait for it, and for its own greeting. A tick is
    // 250 ms at the most.
    const tick = Math.min(250, timeout / 4);
    await within(lingers + tick + 150 + 200, assertGreets(server));
    const lingered = performance.now() - greeted;
    assertGreaterOrEqual(lingered, lingers - 10); // it read that a little late
    assertEquals(await conn.read(new Uint8Array(1)), null);
    await server.shutdown();
    assertEquals(errors(), [undefined, undefined]);
  });
}

test("serve() waits for the whole timeout until a client has read more than 64 KiB", async () => {
  await Promise.all([65_536, 65_537, 1_500_000].map(async (size) => {
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
    const { server, outcomes } = start({
      hostname: "::",
      greeting: ({ hostname }) => hostname,
    });
    for (const hostname of ["::1", "127.0.0.1"]) {
      const conn = await Deno.connect({ hostname, port: server.addr.port });
      assertEquals(await receiveText(conn), hostname);
      assertEquals(outcomes.at(-1)!.remoteAddr, conn.localAddr);
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

test("serve() names a bad option and opens nothing", async () => {
  const numbers = [0, -1, 1.5, 2 ** 31, NaN, Infinity];
  const nonsense: [unknown, Record<string, unknown[]>][] = [
    [RangeError, {
      port: [-1, 65536, 1.5, NaN, Infinity],
      tcpBacklog: numbers,
      timeout: numbers,
      maxConnections: numbers,
    }],
    [TypeError, {
      port: [null, "9000", true],
      tcpBacklog: [null, "1"],
      timeout: [null, "1"],
      maxConnections: [null, "1"],
      greeting: [null, 5, {}, [1, 2]],
    }],
  ];
  // The numbers at both ends of a range are good ones.
  const most = 2 ** 31 - 1;
  const good = {
    port: [0, 65535],
    tcpBacklog: [1, most],
    timeout: [1, most],
    maxConnections: [1, most],
  };
  for (const [name, values] of Object.entries(good)) {
    for (const value of values) {
      const options = { signal: AbortSignal.abort(REASON), [name]: value };
      assertThrows(() => serve(options), Error, "enough", `${name}: ${value}`);
    }
  }
  // A server that got as far as listening would find the port in use.
  await using server = start().server;
  const { hostname, port } = server.addr;
  for (const [kind, options] of nonsense) {
    for (const [name, values] of Object.entries(options)) {
      for (const value of values) {
        const options = { hostname, port, [name]: value };
        const error = assertThrows(() => serve(options)) as Error;
        assertEquals(error.constructor, kind, `${name}: ${value}: ${error}`);
        assertStringIncludes(error.message, `${name} must be `);
      }
    }
  }
});

test("serve() takes undefined for the default", async () => {
  await using server = serve({
    hostname: undefined,
    port: 0,
    greeting: undefined,
    tcpBacklog: undefined,
    timeout: undefined,
    maxConnections: undefined,
    reusePort: undefined,
    signal: undefined,
    onOutcome: undefined,
    onAcceptError: undefined,
  });
  assertEquals(server.addr.hostname, "0.0.0.0");
  assertGreater(server.addr.port, 0);
  await assertGreets(server);
});

// ============================= serve(): stopping =============================

test("shutdown() accepts no more, lets open connections end, and can be called again", async () => {
  const { server, outcomes } = start({ greeting: LARGE });
  const conn = await connect(server);
  await until(() => server.connections === 1);
  const first = server.shutdown();
  const second = server.shutdown();
  let refused = false;
  while (!refused) {
    await sleep(10); // whoever comes in every turn holds up the end
    await connect(server).then((late) => late.close(), () => refused = true);
  }
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
    ["with a backlog of 1", 1, Deno.build.os === "linux" ? 2 : 1],
  ] as const
) {
  test(`shutdown() greets the clients that the kernel has connected, ${name}`, async () => {
    const { server } = start({
      tcpBacklog,
      maxConnections: 1,
      timeout: 20_000,
    });
    const first = await connectAndStay(server);
    const waiting = await times(clients, () => connect(server));
    const { shutdown } = server; // as it is handed to a signal, say
    const shut = shutdown();
    first.close();
    await assertAllGreeted(waiting);
    await shut;
    await assertRefuses(server);
  });
}

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

test("await using shuts down and waits for open connections", async () => {
  const { server, outcomes } = start({ timeout: 100 });
  using _conn = await connectAndStay(server);
  {
    await using _ = server;
    assertEquals(server.connections, 1);
  }
  assertEquals([server.connections, outcomes.length], [0, 1]);
});

// ============================= serve(): aborting =============================

/** A server whose clients would keep it for ever, and what aborts it. */
function startAbortable(options: ServeOptions = {}) {
  const controller = new AbortController();
  const { signal } = controller;
  const abort = () => controller.abort(REASON);
  const running = start({ timeout: 600_000, signal, ...options });
  const finishedAtOnce = () => within(500, running.server.finished);
  return { abort, finishedAtOnce, ...running };
}

for (
  const [clients, options, expected] of [
    ["are being written to", { greeting: LARGE }, REASON],
    ["have not spoken yet", { answer: true }, REASON],
    ["wait for a greeting function", { greeting: () => NEVER }, REASON],
    ["are greeted and stay", {}, undefined],
  ] as const
) {
  test(`an aborted signal closes clients that ${clients}, at once`, async () => {
    const { server, outcomes, errors, abort, finishedAtOnce } = startAbortable(
      options,
    );
    const conns = await times(2, () => connect(server));
    await until(() => server.connections === 2);
    if (!expected) await until(() => outcomes.length === 2);
    abort();
    assertEquals(server.connections, 0);
    abort(); // again, to which nothing happens
    await finishedAtOnce();
    assertEquals(errors(), [expected, expected]);
    await assertRefuses(server);
    conns.forEach((conn) => conn.close());
  });
}

test("an abort in the greeting function closes the client", async () => {
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

test("an aborted signal ends a shutdown that still greets the queue", async () => {
  const options = { maxConnections: 1, greeting: LARGE };
  const { server, errors, abort } = startAbortable(options);
  const conns = await times(2, () => connect(server));
  await until(() => server.connections === 1);
  const shut = server.shutdown();
  abort();
  await within(500, shut);
  assertEquals(errors(), [REASON]); // the other one was not accepted
  await assertRefuses(server);
  conns.forEach((conn) => conn.close());
});

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

test("shutdown() and await using have nothing left to do after an abort", async () => {
  const { server, abort, finishedAtOnce } = startAbortable();
  {
    await using _ = server;
    abort();
    await finishedAtOnce();
  }
  await server.shutdown(); // the sanitizers would find timers that this started
});

test("an abort reason that is no Error reaches onOutcome in one", async () => {
  const controller = new AbortController();
  const { signal } = controller;
  const { server, errors } = start({ greeting: () => NEVER, signal });
  using _conn = await connect(server);
  await until(() => server.connections === 1);
  controller.abort("the power is going");
  await server.finished;
  const [error] = errors();
  assertInstanceOf(error, Error);
  assertStringIncludes(error!.message, "the power is going");
  assertEquals(error!.cause, "the power is going");
});

test("serve() throws the reason of a signal that is aborted already", async () => {
  await using server = start().server; // whose port would be in use
  const { hostname, port } = server.addr;
  const signal = AbortSignal.abort(REASON);
  assertThrows(() => serve({ hostname, port, signal }), Error, "enough");
});

// ==================== serve(): what the kernel does rarely ====================

// The kernel fails or delays an accept() or a write() only when it lacks memory or
// has much to do. No client can bring that about when a test needs it. So these
// tests put a function of their own in the place of accept() or write().

/** Puts a function in the place of accept(), of all listeners. */
function replaceAccept(
  replacement: (
    accept: () => Promise<Deno.TcpConn>,
    port: number,
  ) => Promise<Deno.TcpConn>,
): Disposable {
  using listener = Deno.listen({ port: 0 });
  const prototype = Object.getPrototypeOf(listener);
  const { accept } = prototype;
  prototype.accept = function () {
    return replacement(() => accept.call(this), this.addr.port);
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
    await sleep(0);
    throw errors.shift();
  });
}

/** What Deno throws when the process is out of file descriptors. */
const outOfDescriptors = () => new Error("Too many open files (os error 24)");

test("serve() goes on after accept() has failed, and reports it", async () => {
  const failures = Array.from({ length: 10 }, outOfDescriptors);
  using _ = failAccept(...failures);
  const errors: Error[] = [];
  const { server } = start({ onAcceptError: (e) => void errors.push(e) });
  const began = performance.now();
  await within(1000, assertGreets(server));
  assertGreaterOrEqual(performance.now() - began, 10 * 9); // 10 ms after each
  await server.shutdown();
  assertEquals(errors, failures);
});

test("serve() takes no notice of clients that left before they were accepted, and does not pause", async () => {
  // The errors of other systems, where Linux accepts the dead connection.
  const { ConnectionAborted, ConnectionReset, NotConnected } = Deno.errors;
  const kinds = [ConnectionAborted, ConnectionReset, NotConnected, TypeError];
  using _ = failAccept(
    ...Array.from({ length: 200 }, (_, i) => new kinds[i % 4]!()),
  );
  const errors: Error[] = [];
  const { server } = start({ onAcceptError: (e) => void errors.push(e) });
  await within(1000, assertGreets(server)); // 10 ms after each would be 2 s
  await server.shutdown();
  assertEquals(errors, []);
});

test("an aborted signal ends the pause after a failed accept()", async () => {
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

/**
 * Holds every write, as if the kernel took no bytes, until the test lets it go
 * on. The server writes first writes in groups: while one group is held, the next
 * one gathers, and none of its writes may begin.
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

test("serve() accepts while first writes are held, and writes in closed groups", async () => {
  using writes = holdWrites();
  const { server, outcomes } = start();
  const conns = await times(201, () => connect(server));
  await until(() => server.connections === 201);
  await writes.release(1); // the first client is a group of its own
  await writes.release(0, 200); // the second group: all who came meanwhile
  conns.push(...await times(3, () => connect(server)));
  await until(() => server.connections >= 203);
  await writes.release(199, 200);
  await until(() => outcomes.length === 200);
  await writes.release(1); // still the second group; the newcomers wait for it
  await writes.release(3);
  await assertAllGreeted(conns);
  await server.shutdown();
});

for (const answer of [false, true]) {
  const after = answer ? "the client has spoken" : "a slow greeting function";
  test(`serve() writes in groups after ${after}, too`, async () => {
    using writes = holdWrites();
    const made = Promise.withResolvers<string>();
    const greeting = answer ? GREETING : () => made.promise;
    await using server = start({ answer, greeting }).server;
    const conns = await times(10, () => connect(server));
    await until(() => server.connections === 10);
    made.resolve(GREETING);
    if (answer) { for (const conn of conns) await send(conn, 1); }
    await writes.release(1);
    await writes.release(9);
    await assertAllGreeted(conns);
  });
}

test("serve() cuts off a client that waits for its group, and goes on with the next", async () => {
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

test("an aborted signal closes clients that wait for their group, at once", async () => {
  using writes = holdWrites();
  const { server, errors, abort, finishedAtOnce } = startAbortable();
  const conns = await times(5, () => connect(server));
  await until(() => server.connections === 5);
  abort();
  await finishedAtOnce();
  await writes.release(1);
  await writes.release(4);
  assertEquals(errors(), Array(5).fill(REASON));
  conns.forEach((conn) => conn.close());
});

test("serve() never calls greeted a client that it has cut off", async () => {
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

test("serve() counts a client as greeted that resets right after its greeting", async () => {
  const reset = Promise.withResolvers<void>();
  // The server hears of its write only after the reset.
  using _ = replaceWrite(async (write) => {
    const written = await write();
    await reset.promise;
    return written;
  });
  const { server, errors } = start();
  await connectAndReset(server.addr.port, GREETING.length);
  reset.resolve();
  await server.shutdown();
  assertEquals(errors(), [undefined]);
});

test("serve() hands the kernel no more than 256 KiB at once", async () => {
  const sizes: number[] = [];
  using _ = replaceWrite((write, data) => {
    sizes.push(data.length);
    return write();
  });
  await using server = start({ greeting: LARGE }).server;
  assert(equals(await receive(await connect(server)), LARGE));
  assertEquals(Math.max(...sizes), 256 * 1024);
});

test("serve() reads what it throws away without holding up the event loop", async () => {
  using _ = replaceAccept(async (accept) => {
    const conn = await accept();
    const { close } = conn;
    let closed = false;
    return Object.assign(conn, {
      read: () => closed ? Promise.reject() : Promise.resolve(1), // at once
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

for (
  const failure of [outOfDescriptors, () => new Deno.errors.NotConnected()]
) {
  test(`shutdown() greets the clients that the kernel has connected, after failures of accept(): ${failure()}`, async () => {
    using _ = failAccept(...Array.from({ length: 30 }, failure));
    const { server } = start({ tcpBacklog: 10 });
    const waiting = await times(10, () => connect(server));
    const shut = server.shutdown();
    await assertAllGreeted(waiting);
    await shut;
  });
}

// A stop ends when accept() has not answered for some turns of the event loop. While
// many connections are busy, accept() answers many turns late. The queue must not
// be taken for empty meanwhile.
for (const meanwhile of ["stay", "leave"]) {
  test(`shutdown() waits for accept() the longer, the more clients are connected, even if they ${meanwhile} meanwhile`, async () => {
    const open = 200;
    const late = Promise.withResolvers<void>();
    let calls = 0;
    using _ = replaceAccept(async (accept) => {
      if (calls++ === open) await late.promise;
      return await accept();
    });
    const { server, outcomes } = start({ timeout: 20_000 });
    const conns = await times(open, () => connectAndStay(server));
    await until(() => calls > open);
    const last = await connect(server);
    const shut = server.shutdown();
    if (meanwhile === "leave") conns.forEach((conn) => conn.close());
    // 4 + 200/25 = 12 turns are allowed, and the answer itself takes a few.
    for (let turn = 0; turn < 9; turn++) await sleep(0);
    assertEquals(outcomes.length, open);
    late.resolve();
    await assertAllGreeted([last]);
    if (meanwhile === "stay") conns.forEach((conn) => conn.close());
    await shut;
  });
}

test("shutdown() goes on accepting as long as somebody comes", async () => {
  using _ = replaceAccept((accept) => sleep(0).then(accept)); // one by one
  let calls = 0;
  const all = Promise.withResolvers<string>();
  const { server } = start({
    greeting() {
      if (++calls === 10) all.resolve(GREETING);
      return all.promise;
    },
  });
  const waiting = await times(10, () => connect(server));
  const shut = server.shutdown();
  await assertAllGreeted(waiting);
  await shut;
});

test("shutdown() is not held up by a flood for longer than the timeout", async () => {
  const clients: Promise<unknown>[] = [];
  // Whenever one is accepted, another comes.
  using _ = replaceAccept((accept, port) => {
    const client = Deno.connect({ hostname: "127.0.0.1", port });
    clients.push(client.then(receive).catch(() => {}));
    return accept();
  });
  // From this process: without a bound to its connections it would outrun it.
  const { server, outcomes } = start({ timeout: 400, maxConnections: 50 });
  await until(() => outcomes.length >= 10);
  const before = outcomes.length;
  const began = performance.now();
  await within(1000, server.shutdown());
  assertGreater(outcomes.length - before, 5);
  assertGreaterOrEqual(performance.now() - began, 400);
  await Promise.all(clients);
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

// =============================== A random crowd ===============================

/** Numbers from 0 to 1 that a seed determines (mulberry32). */
function randomFrom(seed: number): () => number {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** What a client of a random crowd did, and saw if it read to its end. */
interface Visit {
  /** Left open by who stays, and not to be closed before all are done. */
  conn?: Deno.Conn;
  received?: Uint8Array;
  ended: number;
}

/** A client that does something at random. */
async function randomVisit(
  conn: Deno.TcpConn,
  pick: <T>(...choices: T[]) => T,
): Promise<Visit> {
  const manner = pick("read", "read", "read", "stall", "part", "leave");
  const before = pick("", "", "wait", "send 10", "send 300000", "half-close");
  const pace = pick("at once", "at once", "slowly", "byte by byte");
  const pieces: Uint8Array[] = [];
  let bytes = 0;
  try {
    if (before === "wait") await sleep(20);
    if (before.startsWith("send")) await send(conn, +before.slice(5));
    if (before === "half-close") await conn.closeWrite();
    if (manner === "stall") return { conn, ended: NaN };
    while (manner !== "leave") {
      // Not all of a megabyte byte by byte.
      const size = pace === "byte by byte" && bytes < 50 ? 1 : 100_000;
      const piece = new Uint8Array(size);
      const n = await conn.read(piece);
      if (n === null) break;
      pieces.push(piece.subarray(0, n));
      bytes += n;
      if (manner === "part") break;
      if (pace === "slowly") await sleep(1);
    }
  } catch (error) {
    assertLeft(error as Error);
  }
  const ended = performance.now();
  if (manner === "read") return { conn, received: concat(pieces), ended };
  conn.close(); // with what was not read, and so a reset
  return { ended };
}

/** A server with random options and its crowd, all from one seed. */
async function randomCrowd(seed: number, accepted: Map<number, number[]>) {
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
    const port = (conn?.localAddr as Deno.NetAddr | undefined)?.port;
    conn?.close();
    if (!received) continue;
    assert(startsWith(whole, received), "wrong bytes");
    if (received.length === whole.length) continue;
    // It has lost something: then its time was up.
    const outcome = outcomes.find((o) => o.remoteAddr.port === port)!;
    const { at, milliseconds, error } = outcome;
    const deadline = error ? at - milliseconds + timeout : at + timeout;
    assertGreaterOrEqual(ended, deadline - 2, `lost bytes: ${error}`);
  }
  await server.shutdown();
  assertEquals(server.connections, 0);
  const ports = outcomes.map(({ remoteAddr }) => remoteAddr.port);
  assertEquals(ports.sort(), accepted.get(server.addr.port)!.sort());
}

test("serve() keeps its promise to a random crowd, with one outcome for each client", async () => {
  const [given] = Deno.args.map(Number); // deno test --allow-net -- SEED
  const first = Math.floor(Math.random() * 2 ** 31);
  const seeds = given === undefined
    ? Array.from({ length: 16 }, (_, i) => first + i)
    : [given];
  /** The ports of the clients that each server has accepted. */
  const accepted = new Map<number, number[]>();
  using _ = replaceAccept(async (accept, port) => {
    const conn = await accept();
    accepted.set(port, [...accepted.get(port) ?? [], conn.remoteAddr.port]);
    return conn;
  });
  // All are awaited, so that one that fails does so alone.
  const crowds = await Promise.allSettled(
    seeds.map((seed) => randomCrowd(seed, accepted)),
  );
  const failures = crowds.flatMap((crowd, i) =>
    crowd.status === "rejected" ? [`seed ${seeds[i]}: ${crowd.reason}`] : []
  );
  assertEquals(failures, []);
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
    [{ greeting: "Hi\n" }, "--greeting Hi", "-g Hi", "-g Hi\n", "-g=Hi"],
    [{ greeting: "-" }, "--greeting=-", "-g -", "-g-"],
    [{ greeting: "-v\n" }, "--greeting=-v"],
    [{ greeting: "a=b\n" }, "-g a=b", "--greeting=a=b"],
    [{ greeting: "5\n" }, "--greeting 5", "-g5"],
    [{ tcpBacklog: 1 }, "--backlog 1", "-b1"],
    [{ tcpBacklog: 2147483647 }, "-b 2147483647"],
    [{ timeout: 2000 }, "--timeout 2", "-t2", "-t 2.0"],
    [{ timeout: 500 }, "-t .5", "-t0.5"],
    [{ timeout: 1 }, "-t 0.001"],
    [{ timeout: 1002 }, "-t 1.0015"],
    [{ maxConnections: 7 }, "--max-connections 7", "-c 7"],
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

const badPorts = ["-1", "1.5", "0x50", "1e3", "65536", "x", "-", "١", "1_0"];
const badTimeouts = ["0", "0.0", "-1", "x", "1e3", "Infinity", "2147484", "1."];

/** What is said, and command lines of which it is: words with a | between them. */
const BAD_COMMAND_LINES: [string, ...string[]][] = [
  [
    "--port needs a value",
    "--port=",
    "--port",
    "--port|",
    "--port|-1",
    "-p",
    "-pv",
  ],
  ...[...badPorts, " 80", "80 "].map((value): [string, string] => [
    `--port must be a whole number from 0 to 65535, not "${value}"`,
    `--port=${value}`,
  ]),
  [String.raw`not "1\n2"`, "--port=1\n2"],
  ["--hostname needs a value", "--hostname"],
  ["--greeting needs a value", "--greeting", "--greeting|-x", "-gHi"],
  ["--backlog must be a whole number from 1 to 2147483647", "-b0", "-b=1.5"],
  ["--max-connections must be a whole number from 1 to 2147483647", "-c|0"],
  [`not "2147483648"`, "-c|2147483648"],
  ...[...badTimeouts, "1,5", "."].map((value): [string, string] => [
    `--timeout must be a number from 0.001 to 2147483, not "${value}"`,
    `--timeout=${value}`,
  ]),
  [`--verbose takes no value, and was given "no"`, "--verbose=no", "-v|no"],
  [`--verbose takes no value, and was given "p80"`, "-vp80"],
  [`--answer takes no value, and was given "no"`, "--answer=no"],
  ["--help takes no value", "--help=yes"],
  [`unknown flag "--prot"`, "--prot|80"],
  [`unknown flag "--no-port"`, "--no-port"],
  [`unknown flag "-x"`, "-x"],
  [`unknown flag "-gno=yes"`, "-gno=yes"],
  [`unknown flag "--port.x=5"`, "--port.x=5"],
  [`unknown flag "--__proto__=5"`, "--__proto__=5"],
  [`stray word "9000"`, "9000", "--|9000"],
  [`stray word ""`, ""],
  [`stray word "-"`, "-"],
  [String.raw`stray word "two\nlines"`, "two\nlines"],
];

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
  const names = "port hostname greeting backlog timeout max-connections " +
    "reuse-port answer verbose help version p H g b t c r a v h V x no-port _ __proto__ " +
    "constructor port.a toString";
  const pieces = [
    ...names.split(" ").flatMap((n) => [`--${n}`, `-${n}`, `--${n}=`, n]),
    ...["-", "--", "=", "", " ", "0", "1", "80", "-1", "1.5", "1e3", "99999"],
    ...["true", "false", "null", "\n", "\0", "ü", "☎", "::1", "0.0.0.0", "a=b"],
  ];
  const pick = () => pieces[Math.floor(Math.random() * pieces.length)]!;
  const signal = AbortSignal.abort(REASON);
  let parsed = 0;
  for (let i = 0; i < 20_000; i++) {
    const args = Array.from(
      { length: i % 5 },
      () => Math.random() < 0.7 ? pick() : pick() + pick(),
    );
    const flags = await parseFlags(args).catch((error: Error) => {
      const kinds: unknown[] = [Error, RangeError];
      assert(kinds.includes(error.constructor), `${args}: ${error}`);
      assertMatch(error.message, /^[^\n]+$/);
    });
    if (!flags) continue;
    parsed++;
    // Checks the options first, and then throws the reason.
    assertThrows(() => serve({ ...flags, signal }), Error, "enough");
    assert(flags.hostname !== "" && flags.greeting !== "");
    for (const name of ["reusePort", "answer", "verbose", "help"] as const) {
      assertEquals(typeof flags[name], "boolean");
    }
  }
  assertGreater(parsed, 4000);
});

// ========================== The command line: tools ==========================

/** What the tests of the command line need: processes, sh, nc, script, /proc. */
const hasProcesses = Deno.build.os === "linux" &&
  Deno.permissions.querySync({ name: "run" }).state === "granted";

/** A test of server.ts as a process. */
function it(name: string, fn: () => Promise<void>, ignore = false): void {
  test(`server.ts ${name}`, fn, ignore || !hasProcesses);
}

const SERVER = `${import.meta.dirname}/server.ts`;

/** What runs the server: after it come the server's own arguments. */
function denoRun(...permissions: string[]): string[] {
  return [Deno.execPath(), "run", "--no-prompt", ...permissions, SERVER];
}

/** Runs a shell script to its end, with `args` as its "$@". */
async function sh(script: string, ...args: string[]) {
  const command = ["-c", script, "sh", ...args];
  const run = await new Deno.Command("sh", { args: command }).output();
  const [out, err] = [decode(run.stdout), decode(run.stderr)];
  return { code: run.code, stdout: run.stdout, out, err };
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

/** Starts the command line, on a free port of 127.0.0.1 unless `args` differ. */
async function launch(
  args: string[] = [],
  { stdin = new Uint8Array(), limit = "", permission = "--allow-net" } = {},
) {
  const command = [...denoRun(permission), "-H127.0.0.1", "-p0", ...args];
  const child = new Deno.Command("sh", {
    args: ["-c", `${limit} exec "$@"`, "sh", ...command],
    stdin: "piped",
    stderr: "piped",
  }).spawn();
  const log = watch(child.stderr);
  const writer = child.stdin.getWriter();
  await writer.write(stdin);
  await writer.close();
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
    const [first, ...others] = server.lines();
    assertMatch(first!, /^Listening/);
    for (const line of others) assertMatch(line, /^Stop/); // none for a client
  }
});

it("does not say that it waits where no connection is open", async () => {
  const server = await launch();
  assertEquals(await server.stop(), stopped(0));
  assertEquals(server.lines().length, 2);
});

for (
  const [host, address, client] of [
    ["0.0.0.0", "0.0.0.0", "127.0.0.1"],
    ["127.0.0.2", "127.0.0.2", "127.0.0.2"],
    ["localhost", "127.0.0.1", "127.0.0.1"],
    ["::", "[::]", "::1"],
    ["::1", "[::1]", "::1"],
  ] as const
) {
  it(
    `shows how to reach it on ${host}, with a command that works`,
    async () => {
      const server = await launch(["--hostname", host]);
      assertEquals(server.address, address);
      assertStringIncludes(server.nc, `nc ${client} `);
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
  const server = await launch(["--hostname", linkLocal]);
  assertEquals((await sh(`${server.nc} </dev/null`)).out, GREETING);
  assertMatch(server.address!, /^\[fe80::.*%.+\]$/);
  assertEquals(await server.stop(), stopped(1));
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

it("prints a line for every connection with --verbose", async () => {
  const args = ["--verbose", "--timeout=1", "--greeting=-"];
  const server = await launch(args, { stdin: LARGE });
  const good = await server.connect();
  await receive(good);
  using stuck = await server.connect();
  for (
    const [conn, how] of [
      [good, `greeted: ${LARGE.length} bytes`],
      [stuck, String.raw`failed, not greeted in 1000 ms: \d+ bytes`],
    ] as const
  ) {
    const { port } = conn.localAddr as Deno.NetAddr;
    const line = `^127\\.0\\.0\\.1:${port} ${how}, \\d+\\.\\d ms$`;
    await server.line(new RegExp(line));
  }
  assertEquals(await server.stop(), stopped(1, 1));
});

for (
  const [what, code, command, line] of [
    // One process for each kind of problem. The tests of parseFlags() have all.
    ["a bad value", 2, "server.ts -p 1.5", "--port must be "],
    ["a missing value", 2, "server.ts --port=", "--port needs a value"],
    ["an unknown flag", 2, "server.ts --bogus", "unknown flag"],
    ["a stray word", 2, "server.ts 'a\nb'", "stray word"],
    [
      "a port in use",
      1,
      "--allow-net server.ts -p TAKEN",
      "on 0.0.0.0:TAKEN: Address already in use",
    ],
    [
      "the address of another machine",
      1,
      "--allow-net server.ts -H 203.0.113.1 -p TAKEN",
      "on 203.0.113.1:TAKEN: Cannot assign",
    ],
    [
      "a name without an address",
      1,
      "--allow-net server.ts -H no.invalid -p TAKEN",
      "on no.invalid:TAKEN: failed to lookup",
    ],
    [
      "two lines for a host",
      1,
      "--allow-net server.ts -H 'a\nb' -p TAKEN",
      "on a b:TAKEN: invalid",
    ],
    ["no permission", 1, "server.ts", "run again with the --allow-net flag"],
    [
      "a permission for another address",
      1,
      "--allow-net=0.0.0.0 server.ts -H ::1 -p TAKEN",
      "on [::1]:TAKEN: Requires net access",
    ],
    [
      "empty standard input",
      1,
      "server.ts --greeting=- </dev/null",
      "read standard input: it is empty",
    ],
    [
      "a folder as standard input",
      1,
      "server.ts --greeting=- </",
      "read standard input: Is a directory",
    ],
    [
      "a full disk for the help",
      1,
      "server.ts --help >/dev/full",
      "write to standard output: No space left",
    ],
  ] as const
) {
  it(`says what is wrong with ${what} in one line, with exit code ${code}`, async () => {
    // A server that got as far as listening would find the port in use.
    using listener = Deno.listen({ port: 0 });
    const taken = `${(listener.addr as Deno.NetAddr).port}`;
    const run = await sh(
      `cd "$1" && exec "$2" run --no-prompt ${command.replace("TAKEN", taken)}`,
      import.meta.dirname!,
      Deno.execPath(),
    );
    assertEquals([run.code, run.out], [code, ""], run.err);
    const form = code === 2 ? /^.+ \(see --help\)\n$/ : /^Cannot .+\n$/;
    assertMatch(run.err, form);
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
    ...denoRun("--allow-net"),
    "-p1",
  );
  assertEquals(code, 1);
  assertMatch(err, /^Cannot listen on 0\.0\.0\.0:1: Permission denied.*\n$/);
}, !hasPrivilegedPorts);

it("prints help and version to standard output, without any permission", async () => {
  const help = await sh('exec "$@"', ...denoRun(), "--help");
  assertEquals([help.code, help.err], [0, ""]);
  assert(readme.includes(`\`\`\`\n${help.out}\`\`\`\n`), help.out);
  const version = await sh('exec "$@"', ...denoRun(), "-V");
  assertEquals([version.code, version.err], [0, ""]);
  assertEquals(version.out, `${config.name} ${config.version}\n`);
});

it("needs no more permission than its own address", async () => {
  const permission = "--allow-net=0.0.0.0:0";
  const server = await launch(["-H", "0.0.0.0"], { permission });
  assertEquals((await sh(`${server.nc} </dev/null`)).out, GREETING);
  assertEquals(await server.stop(), stopped(1));
});

// ================== server.ts and its examples, elsewhere ==================

it("is imported by path, or copied, into any project", async () => {
  const strictest = "erasableSyntaxOnly exactOptionalPropertyTypes strict " +
    "isolatedDeclarations noFallthroughCasesInSwitch noImplicitOverride " +
    "noImplicitReturns noPropertyAccessFromIndexSignature noUnusedLocals " +
    "noUncheckedIndexedAccess noUnusedParameters verbatimModuleSyntax";
  const stable = [
    "dom",
    "dom.iterable",
    "dom.asynciterable",
    "deno.ns",
    "esnext",
  ];
  const projects = [
    {},
    Object.fromEntries(strictest.split(" ").map((option) => [option, true])),
    { lib: stable }, // without deno.unstable
  ];
  const program = (from: string) =>
    `import { serve } from "${from}";
await using server = serve({ hostname: "127.0.0.1", port: 0 });
const conn = await Deno.connect({ port: server.addr.port });
console.log(await new Response(conn.readable).text());`;
  const { code, out, err } = await sh(
    `deno=$1 path=$2; dir=$(mktemp -d) && trap 'rm -r "$dir"' EXIT && cd "$dir" &&
    cp "$path" . && printf %s "$3" >path.ts && printf %s "$4" >copy.ts || exit
    shift 4
    for config; do
      echo "$config" >deno.json
      "$deno" check server.ts path.ts copy.ts && "$deno" run --allow-net path.ts &&
      "$deno" run --allow-net copy.ts || exit
    done`,
    Deno.execPath(),
    SERVER,
    program(SERVER),
    program("./server.ts"),
    ...projects.map((compilerOptions) => JSON.stringify({ compilerOptions })),
  );
  assertEquals([code, out], [0, `${GREETING}\n`.repeat(6)], err);
});

it("has programs in the README that type-check", async () => {
  const programs = [...readme.matchAll(/^```ts ignore\n([^]*?)^```/gm)];
  assertEquals(programs.length, 3);
  for (const [, program] of programs) {
    const { code, err } = await sh(
      `dir=$(mktemp -d) && trap 'rm -r "$dir"' EXIT && cd "$dir" &&
      printf '%s\nexport {};' "$2" >program.ts && "$1" check program.ts`,
      Deno.execPath(),
      program!,
    );
    assertEquals(code, 0, err);
  }
});

it("says in one line that a lone copy lacks @std/cli, with exit code 1", async () => {
  for (const flag of ["--port=0", "--help"]) {
    const { code, out, err } = await sh(
      `dir=$(mktemp -d) && trap 'rm -r "$dir"' EXIT && cp "$2" "$dir" &&
      "$1" run --no-prompt --allow-net "$dir/server.ts" "$3"`,
      Deno.execPath(),
      SERVER,
      flag,
    );
    assertEquals([code, out], [1, ""], err);
    assertMatch(err, /^Cannot load @std\/cli\/parse-args: .+\n$/);
  }
});

it("serves when the example of the module comment is run as a program", async () => {
  const source = (await sh('cat "$1"', SERVER)).out;
  const [, comment] = /```ts ignore\n([^]*?)\n \* ```/.exec(source)!;
  const listeners = times(3, () => Promise.resolve(Deno.listen({ port: 0 })));
  const ports = (await listeners).map(({ addr }) =>
    (addr as Deno.NetAddr).port
  );
  (await listeners).forEach((listener) => listener.close());
  let i = 0;
  const example = comment!.replace(/^ \* ?/gm, "")
    .replace("./server.ts", SERVER)
    .replace(/port: \d+/g, () => `port: ${ports[i++]}`);
  assertEquals(i, 3);
  const child = new Deno.Command(Deno.execPath(), {
    args: ["run", "--check", "--no-prompt", "--allow-net", "--ext=ts", "-"],
    stdin: "piped",
  }).spawn();
  const writer = child.stdin.getWriter();
  await writer.write(new TextEncoder().encode(example));
  await writer.close();
  const greetings: string[] = [];
  for (const port of ports) {
    let conn: Deno.Conn | undefined;
    while (!conn) conn = await Deno.connect({ port }).catch(() => undefined);
    greetings.push(await receiveText(conn));
  }
  child.kill("SIGKILL");
  await child.status;
  assertEquals(greetings[0], "Less is more.\r\n");
  assertMatch(greetings[1]!, /^\w{3} \w{3} \d\d .*\r\n$/);
  assertEquals(greetings[2], "127.0.0.1\n");
});

// ======================= The command line: how it stops =======================

it("lets open connections end when told to stop, and says what it waits for", async () => {
  const server = await launch(["--timeout=20"]);
  using conn = await server.connect();
  await conn.read(new Uint8Array(100));
  const began = performance.now();
  server.kill("SIGINT");
  await server.line(
    /^Stopping: waiting for clients \(1 left\); a second signal ends it$/,
  );
  server.kill("SIGINT"); // so soon it is the same one, as under deno task
  assertEquals(await server.ended(), stopped(1));
  assertLess(performance.now() - began, 10_000); // the timeout has not come
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
    const { code, signal, last } = await within(3000, ended);
    assertEquals([code, signal], [exitCode, second]);
    assertMatch(last!, /^Stopping/);
    await killed;
  });
}

/** Runs a command on a terminal of its own. */
function onTerminal(command: string) {
  const child = new Deno.Command("script", {
    args: ["-qec", command, "/dev/null"],
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
  const terminal = onTerminal(
    `"${denoRun("--allow-net").join('" "')}" -p0 -g-`,
  );
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

for (const crowd of ["nobody", "1,000 that send", "1,000 that leave"]) {
  it(`greets whom the kernel has connected behind ${crowd}, and then stops`, async () => {
    const server = await launch();
    const size = crowd === "nobody" ? 1 : 1000; // one, for it to be awake
    const others = await times(size, server.connect);
    for (const conn of others) await conn.read(new Uint8Array(100));
    server.kill("SIGSTOP");
    for (const conn of others) {
      if (crowd.endsWith("send")) await conn.write(new Uint8Array(100));
      else conn.close();
    }
    const waiting = await times(500, server.connect);
    server.kill("SIGCONT");
    server.kill("SIGTERM");
    await assertAllGreeted(waiting);
    if (crowd.endsWith("send")) others.forEach((conn) => conn.close());
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

// ==================== The command line: its surroundings ====================

it("lives through a want of file descriptors, and greets all in the end", async () => {
  const began = performance.now();
  const server = await launch(["--timeout=20"], { limit: "ulimit -n 64;" });
  const conns = await times(100, server.connect);
  for (const conn of conns) { // they read, but never close
    assertEquals(await conn.read(new Uint8Array(100)), GREETING.length);
  }
  assertEquals(await server.stop(), stopped(100));
  conns.forEach((conn) => conn.close());
  const complaints = server.lines().filter((line) =>
    /^Cannot accept, trying again: Too many open files/.test(line)
  );
  assertGreater(complaints.length, 0);
  // One a second.
  assertLess(complaints.length, 2 + (performance.now() - began) / 1000);
});

it("holds waiting clients in little memory, and gives every socket back", async () => {
  const args = ["--timeout=1000", "--greeting=-"];
  const server = await launch(args, { stdin: LARGE });
  const figures = async () => {
    const { out } = await sh(
      `awk '/VmRSS/ { print $2 }' /proc/${server.pid}/status; ls -l /proc/${server.pid}/fd | grep -c socket:`,
    );
    const [kilobytes = NaN, sockets = NaN] = out.split("\n").map(Number);
    return { kilobytes, sockets };
  };
  const idle = (await figures()).sockets;
  const untilOpen = async (clients: number) => {
    while ((await figures()).sockets !== idle + clients);
  };
  await times(300, async () => (await server.connect()).close()); // warms it up
  await untilOpen(0);
  const before = await figures();
  const conns = await times(300, server.connect);
  for (const conn of conns) await conn.read(new Uint8Array(100));
  await untilOpen(300);
  const during = await figures();
  assertLess((during.kilobytes - before.kilobytes) / conns.length, 20);
  conns.forEach((conn) => conn.close());
  await untilOpen(0);
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
  const command = [...denoRun("--allow-net"), "--verbose", `--port=${port}`];
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
  return { stderr: child.stderr, connect, stop };
}

for (
  const [log, script] of [
    ["is closed", 'exec "$@" 2>&-'],
    ["is a full disk", 'exec "$@" 2>/dev/full'],
    ["has lost its reader", 'exec "$@"'],
    ["is not read", 'exec "$@"'],
  ] as const
) {
  it(`greets on and stops while its log ${log}`, async () => {
    const server = await launchUnread(script);
    if (log === "has lost its reader") await server.stderr.cancel();
    await greetMany(server.connect, 3000);
    await server.stop();
    await server.stderr.cancel();
  });
}

it("writes every line of a log that is read late, where that is non-blocking", async () => {
  const server = await launchUnread(
    `exec perl -MFcntl -e 'fcntl(STDERR, F_SETFL, O_WRONLY | O_NONBLOCK); exec @ARGV' "$@"`,
  );
  await greetMany(server.connect, 3000);
  const { lines, end } = watch(server.stderr);
  await until(() => lines().length === 3002); // with "Listening"
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

const MESSAGE = new TextEncoder().encode(GREETING);
const SINK = new Uint8Array(262144);

/** The plain loop of the README: no half-close, no drain, no deadline. */
async function plain(conn: Deno.TcpConn) {
  await conn.write(MESSAGE);
  conn.close();
}

/** The same promise as serve()'s, and nothing else: no deadline, no limits. */
async function floor(conn: Deno.TcpConn) {
  await conn.write(MESSAGE);
  await conn.closeWrite();
  while (await conn.read(SINK) !== null);
  conn.close();
}

function loop(greet: (conn: Deno.TcpConn) => Promise<void>) {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  (async () => {
    for await (const conn of listener) greet(conn);
  })();
  return { port: listener.addr.port, stop: () => listener.close() };
}

function greetingServer() {
  const { server } = start();
  return { port: server.addr.port, stop: server.shutdown };
}

/** Greets `total` clients, `atOnce` of them at the same time. */
async function load(port: number, atOnce: number, total: number) {
  let left = total;
  async function client() {
    const buffer = new Uint8Array(100);
    while (left-- > 0) {
      using conn = await Deno.connect({ hostname: "127.0.0.1", port });
      let bytes = 0;
      for (let n; (n = await conn.read(buffer)) !== null;) bytes += n;
      assertEquals(bytes, GREETING.length);
    }
  }
  await Promise.all(Array.from({ length: atOnce }, client));
}

for (const atOnce of [1, 64]) {
  for (
    const [name, launch] of [
      ["plain loop", () => loop(plain)],
      ["floor", () => loop(floor)],
      ["serve()", greetingServer],
    ] as const
  ) {
    Deno.bench({
      name,
      group: `1000 clients, ${atOnce} at once`,
      baseline: name === "floor",
      warmup: 2,
      n: 50,
      async fn(b) {
        const { port, stop } = launch();
        b.start();
        await load(port, atOnce, 1000);
        b.end();
        await stop();
      },
    });
  }
}
