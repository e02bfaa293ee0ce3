/**
 * Tests and benchmarks of the greeting server.
 *
 * `deno test --allow-net` tests the module, with real sockets. Where
 * `--allow-run` is granted too, the command line is tested as its user sees it:
 * a process of its own, nc for a client, signals, limits and exit codes.
 */

import {
  assert,
  assertEquals,
  assertGreater,
  assertGreaterOrEqual,
  assertInstanceOf,
  assertLess,
  assertLessOrEqual,
  assertMatch,
  assertRejects,
  assertStringIncludes,
  assertThrows,
} from "@std/assert";
import { concat, equals } from "@std/bytes";
import { Socket } from "node:net";
import config from "./deno.json" with { type: "json" };
import readme from "./README.md" with { type: "text" };
import source from "./server.ts" with { type: "text" };
import {
  canCutOff,
  DEFAULTS,
  type GreetingServer,
  type Outcome,
  parseFlags,
  serve,
  type ServeOptions,
  UsageError,
} from "./server.ts";

const GREETING = "Hello from server\n";
/** 20 MiB, more than both buffers of a connection take; no part like another. */
const LARGER_THAN_BUFFERS = new Uint8Array(
  new Uint32Array(5 << 20).map((_, i) => i).buffer,
);

// =============================== Client helpers ===============================

/** A server on a free port of 127.0.0.1 that notes how its clients fared. */
function start(options: ServeOptions = {}) {
  const outcomes: Outcome[] = [];
  const server = serve({
    hostname: "127.0.0.1",
    port: 0,
    onOutcome: (outcome) => void outcomes.push(outcome),
    ...options,
  });
  return { server, outcomes };
}

function connect(server: GreetingServer): Promise<Deno.TcpConn> {
  return Deno.connect({ hostname: "127.0.0.1", port: server.addr.port });
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

async function assertGreets(server: GreetingServer): Promise<void> {
  assertEquals(await receiveText(await connect(server)), GREETING);
}

/** A client is refused, or reset if it came just before the end. */
async function assertNotServed(server: GreetingServer): Promise<void> {
  await assertRejects(async () => await receive(await connect(server)));
}

async function send(conn: Deno.Conn, size: number): Promise<void> {
  const data = new Uint8Array(size).fill(0x78);
  for (let sent = 0; sent < size;) {
    sent += await conn.write(data.subarray(sent));
  }
}

/** Connects and resets the connection. */
async function connectAndReset(port: number): Promise<void> {
  const socket = new Socket();
  await new Promise<void>((resolve, reject) => {
    socket.once("connect", () => socket.resetAndDestroy());
    socket.once("close", () => resolve());
    socket.once("error", reject);
    socket.connect(port, "127.0.0.1");
  });
}

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

function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** Gives timers another delay than they are set to. */
function replaceDelays(delay: (ms?: number) => number | undefined): Disposable {
  const { setTimeout } = globalThis;
  globalThis.setTimeout =
    ((callback: () => void, ms?: number) =>
      setTimeout(callback, delay(ms))) as unknown as typeof setTimeout;
  return { [Symbol.dispose]: () => globalThis.setTimeout = setTimeout };
}

/** Connects, reads the greeting, and keeps the connection open. */
async function connectAndStay(server: GreetingServer): Promise<Deno.TcpConn> {
  const conn = await connect(server);
  assertEquals(await conn.read(new Uint8Array(100)), GREETING.length);
  return conn;
}

/** Waits until the port refuses connections. */
async function refused(server: GreetingServer): Promise<void> {
  while (true) {
    try {
      (await connect(server)).close();
      await sleep(10); // whoever comes in every turn holds up the end
    } catch (error) {
      if (error instanceof Deno.errors.ConnectionRefused) return;
      assertInstanceOf(error, Deno.errors.ConnectionReset); // in the queue
    }
  }
}

// ============================ serve(): the greeting ============================

Deno.test("serve() greets a client and closes the connection", async () => {
  const { server, outcomes } = start();
  await assertGreets(server);
  await server.shutdown();
  assertEquals(outcomes.length, 1);
  assertEquals(outcomes[0]!.bytes, GREETING.length);
  assertEquals(outcomes[0]!.error, undefined);
  assertEquals(outcomes[0]!.remoteAddr.hostname, "127.0.0.1");
  assertGreaterOrEqual(outcomes[0]!.milliseconds, 0);
});

Deno.test("serve() sends bytes as they are, text as UTF-8, and nothing else", async () => {
  const bytes = Uint8Array.from({ length: 256 }, (_, i) => i);
  const greetings = [bytes, "grüß dich ☎", "\r\n\r\n", "", new Uint8Array()];
  for (const greeting of greetings) {
    await using server = start({ greeting }).server;
    const expected = typeof greeting === "string"
      ? new TextEncoder().encode(greeting)
      : greeting;
    assertEquals(await receive(await connect(server)), expected);
  }
});

Deno.test("serve() greets many clients at once", async () => {
  const { server, outcomes } = start();
  const conns = await Promise.all(
    Array.from({ length: 500 }, () => connect(server)),
  );
  const texts = await Promise.all(conns.map(receiveText));
  assertEquals(texts, Array(500).fill(GREETING));
  await server.shutdown();
  assertEquals(outcomes.filter(({ error }) => !error).length, 500);
});

Deno.test("serve() sends a greeting larger than the socket buffers whole", async () => {
  const { server, outcomes } = start({ greeting: LARGER_THAN_BUFFERS });
  const received = await receive(await connect(server));
  assert(equals(received, LARGER_THAN_BUFFERS));
  await server.shutdown();
  assertEquals(outcomes[0]!.bytes, LARGER_THAN_BUFFERS.length);
});

Deno.test("serve() sends a large greeting whole to fast and slow readers, past 200 that read nothing", async () => {
  const { server } = start({ greeting: LARGER_THAN_BUFFERS, timeout: 60_000 });
  const stuck = await Promise.all(
    Array.from({ length: 200 }, () => connect(server)),
  );
  const slow = (async () => {
    const conn = await connect(server);
    const chunks: Uint8Array[] = [];
    for await (const chunk of conn.readable) {
      chunks.push(chunk);
      if (chunks.length % 8 === 0) await sleep(1);
    }
    return concat(chunks);
  })();
  // While all of them are still being written to:
  const fast = await receive(await connect(server));
  assertGreaterOrEqual(server.connections, 200);
  assert(equals(fast, LARGER_THAN_BUFFERS));
  assert(equals(await slow, LARGER_THAN_BUFFERS));
  stuck.forEach((conn) => conn.close());
  await server.shutdown();
});

Deno.test("serve() calls a function for the greeting, with the client's address", async () => {
  await using server = start({
    greeting: ({ hostname, port }) => `${hostname} ${port}`,
  }).server;
  const conn = await connect(server);
  const { hostname, port } = conn.localAddr as Deno.NetAddr;
  assertEquals(await receiveText(conn), `${hostname} ${port}`);
});

Deno.test("serve() fails only the connection whose greeting function throws", async () => {
  let calls = 0;
  const bad = [new Error("no quote today"), "a string", undefined];
  const { server, outcomes } = start({
    greeting() {
      if (calls < bad.length) throw bad[calls++];
      return calls++ === bad.length ? 5 as unknown as string : GREETING;
    },
  });
  for (let i = 0; i < 4; i++) {
    assertEquals(await receiveText(await connect(server)), "");
  }
  await assertGreets(server);
  await server.shutdown();
  assertEquals(outcomes.map(({ bytes }) => bytes), [
    0,
    0,
    0,
    0,
    GREETING.length,
  ]);
  assertEquals(outcomes[0]!.error, bad[0]);
  assertEquals(outcomes[1]!.error?.cause, "a string");
  assertInstanceOf(outcomes[2]!.error, Error);
  assertMatch(
    outcomes[3]!.error!.message,
    /greeting must be a string or a Uint8/,
  );
});

Deno.test("serve() waits for the promise of a greeting function, and keeps nobody else waiting", async () => {
  const slow = Promise.withResolvers<Uint8Array>();
  let calls = 0;
  await using server = start({
    greeting: async () => calls++ === 0 ? await slow.promise : GREETING,
  }).server;
  const first = await connect(server);
  for (let i = 0; i < 100; i++) await assertGreets(server);
  slow.resolve(new TextEncoder().encode("at last"));
  assertEquals(await receiveText(first), "at last");
});

Deno.test("serve() fails only the connection whose greeting function rejects", async () => {
  const reason = new Error("the database is down");
  let calls = 0;
  const { server, outcomes } = start({
    greeting: () =>
      calls++ === 0 ? Promise.reject(reason) : Promise.resolve(GREETING),
  });
  assertEquals(await receiveText(await connect(server)), "");
  await assertGreets(server);
  await server.shutdown();
  assertEquals(outcomes.map(({ error }) => error), [reason, undefined]);
});

Deno.test("serve() cuts off at the timeout a client whose greeting function never answers", async () => {
  const late = Promise.withResolvers<string>();
  let calls = 0;
  const { server, outcomes } = start({
    timeout: 100,
    greeting: () => calls++ === 0 ? late.promise : GREETING,
  });
  const first = await connect(server);
  await assertGreets(server);
  assertEquals(await receiveText(first), "");
  late.reject(new Error("nobody waits for this any more"));
  await server.shutdown();
  assertEquals(outcomes[0]!.error, undefined);
  assertInstanceOf(outcomes[1]!.error, Deno.errors.TimedOut);
  assertGreaterOrEqual(outcomes[1]!.milliseconds, 99);
});

// ============================ serve(): the clients ============================

for (const size of [1, 1000, 100_000, 4_000_000]) {
  Deno.test(`serve() greets a client that sends ${size} bytes before it reads`, async () => {
    const { server, outcomes } = start();
    const conns = await Promise.all(
      Array.from({ length: 20 }, async () => {
        const conn = await connect(server);
        await send(conn, size);
        return conn;
      }),
    );
    const texts = await Promise.all(conns.map(receiveText));
    assertEquals(texts, Array(20).fill(GREETING));
    await server.shutdown();
    assertEquals(outcomes.filter(({ error }) => error), []);
  });
}

Deno.test("serve() sends a large greeting to a client that sends as much before it reads", async () => {
  await using server = start({ greeting: LARGER_THAN_BUFFERS }).server;
  const conn = await connect(server);
  await send(conn, LARGER_THAN_BUFFERS.length);
  assert(equals(await receive(conn), LARGER_THAN_BUFFERS));
});

Deno.test("serve() greets a client that has closed its half before", async () => {
  await using server = start({ greeting: LARGER_THAN_BUFFERS }).server;
  const conn = await connect(server);
  await conn.closeWrite();
  assert(equals(await receive(conn), LARGER_THAN_BUFFERS));
});

Deno.test("serve() greets a client that reads a byte at a time", async () => {
  await using server = start().server;
  using conn = await connect(server);
  const byte = new Uint8Array(1);
  let text = "";
  while (await conn.read(byte) !== null) text += String.fromCharCode(...byte);
  assertEquals(text, GREETING);
});

Deno.test("serve() goes on when clients reset, or vanish without a word", async () => {
  await using server = start().server;
  for (let i = 0; i < 20; i++) {
    await connectAndReset(server.addr.port);
    (await connect(server)).close();
  }
  await assertGreets(server);
});

Deno.test("serve() takes no notice of clients that reset before they are accepted", async () => {
  const acceptErrors: Error[] = [];
  const { server, outcomes } = start({
    maxConnections: 1,
    onAcceptError: (error) => void acceptErrors.push(error),
  });
  // The first client holds the only place, the others wait in the queue.
  const first = await connect(server);
  await first.read(new Uint8Array(100));
  for (let i = 0; i < 5; i++) await connectAndReset(server.addr.port);
  const last = await connect(server);
  first.close();
  assertEquals(await receiveText(last), GREETING);
  await server.shutdown();
  assertEquals(outcomes.length, 2);
  assertEquals(acceptErrors, []);
});

Deno.test("serve() reports a client that resets while it is written to", async () => {
  const { server, outcomes } = start({ greeting: LARGER_THAN_BUFFERS });
  const conn = await connect(server);
  await conn.read(new Uint8Array(100));
  conn.close(); // with data unread, and so a reset
  await server.shutdown();
  assertEquals(outcomes.length, 1);
  assertLess(outcomes[0]!.bytes, LARGER_THAN_BUFFERS.length);
  assertMatch(outcomes[0]!.error!.message, /reset|broken pipe/i);
});

Deno.test("serve() counts a client as greeted that resets right after the greeting", async () => {
  using _ = replaceAccept(async (accept) =>
    Object.assign(await accept(), {
      closeWrite: () => Promise.reject(new Deno.errors.NotConnected()),
    })
  );
  const { server, outcomes } = start();
  await assertGreets(server);
  await server.shutdown();
  assertEquals(outcomes[0]!.bytes, GREETING.length);
  assertEquals(outcomes[0]!.error, undefined);
});

Deno.test("serve() cuts off at the timeout a client that reads nothing", async () => {
  const { server, outcomes } = start({
    greeting: LARGER_THAN_BUFFERS,
    timeout: 100,
  });
  using _conn = await connect(server);
  await server.shutdown();
  assertLess(outcomes[0]!.bytes, LARGER_THAN_BUFFERS.length);
  assertInstanceOf(outcomes[0]!.error, Deno.errors.TimedOut);
  assertGreaterOrEqual(outcomes[0]!.milliseconds, 99);
});

Deno.test("serve() reports a client when it is greeted, not when it closes", async () => {
  const greeted = Promise.withResolvers<Outcome>();
  const { server } = start({ onOutcome: greeted.resolve, timeout: 20_000 });
  const began = performance.now();
  using conn = await connect(server);
  const { remoteAddr, bytes, error } = await greeted.promise;
  assertLess(performance.now() - began, 10_000); // it was not closed by the server
  assertEquals(server.connections, 1);
  assertEquals(remoteAddr, conn.localAddr as Deno.NetAddr);
  assertEquals([bytes, error], [GREETING.length, undefined]);
  conn.close();
  await server.shutdown();
});

Deno.test("serve() gives a client the timeout for its greeting, and then once more to close", async () => {
  const { server, outcomes } = start({
    timeout: 200,
    greeting: async () => {
      await sleep(150);
      return GREETING;
    },
  });
  using conn = await connectAndStay(server);
  const greeted = performance.now();
  assertEquals(await conn.read(new Uint8Array(100)), null);
  await server.shutdown(); // when it was closed
  assertGreaterOrEqual(performance.now() - greeted, 190);
  assertEquals(outcomes.map(({ error }) => error), [undefined]);
});

Deno.test("serve() keeps each deadline, also of clients that come later", async () => {
  const { server, outcomes } = start({
    timeout: 200,
    greeting: LARGER_THAN_BUFFERS,
  });
  const conns: Deno.Conn[] = [];
  for (let i = 0; i < 5; i++) {
    conns.push(await connect(server));
    await sleep(30);
  }
  await server.shutdown();
  conns.forEach((conn) => conn.close());
  assertEquals(outcomes.length, 5);
  for (const { error, milliseconds } of outcomes) {
    assertInstanceOf(error, Deno.errors.TimedOut);
    assertGreaterOrEqual(milliseconds, 199);
  }
});

Deno.test("serve() closes at the timeout a client that sends for ever, and greets others meanwhile", async () => {
  const { server, outcomes } = start({ timeout: 500 });
  const flood = (async () => {
    using conn = await connect(server);
    const connected = performance.now();
    await assertRejects(async () => {
      while (true) await conn.write(LARGER_THAN_BUFFERS);
    });
    return performance.now() - connected;
  })();
  for (let i = 0; i < 50; i++) await assertGreets(server);
  assertGreaterOrEqual(await flood, 490);
  await server.shutdown();
  assertEquals(outcomes.filter(({ error }) => !error).length, 51);
});

Deno.test("serve() holds no more than maxConnections, and greets all in turn", async () => {
  let most = 0;
  const { server, outcomes } = start({
    maxConnections: 10,
    timeout: 50,
    greeting() {
      most = Math.max(most, server.connections);
      return GREETING;
    },
  });
  const conns = await Promise.all(
    Array.from({ length: 100 }, () => connect(server)),
  );
  for (const conn of conns) { // they read, but never close
    const buffer = new Uint8Array(100);
    assertEquals(await conn.read(buffer), GREETING.length);
  }
  await server.shutdown();
  conns.forEach((conn) => conn.close());
  assertEquals(outcomes.length, 100);
  assertEquals(most, 10);
});

Deno.test("serve() lets greeted clients linger for a second at most while there is no room", async () => {
  const { server } = start({ maxConnections: 10, timeout: 20_000 });
  const began = performance.now();
  const holders = await Promise.all(
    Array.from({ length: 10 }, () => connectAndStay(server)),
  );
  await assertGreets(server);
  const waited = performance.now() - began;
  assertGreaterOrEqual(waited, 990);
  assertLess(waited, 10_000); // the timeout has not come
  holders.forEach((conn) => conn.close());
  await server.shutdown();
});

Deno.test("serve() hurries nobody that still waits for its greeting", async () => {
  let clients = 0;
  const { server, outcomes } = start({
    maxConnections: 2,
    timeout: 1500,
    greeting: () => clients++ === 0 ? LARGER_THAN_BUFFERS : GREETING,
  });
  using _stuck = await connect(server);
  using _holder = await connectAndStay(server);
  await assertGreets(server);
  await server.shutdown();
  const [holder, next, stuck] = outcomes;
  assertEquals([holder?.error, next?.error], [undefined, undefined]);
  assertInstanceOf(stuck?.error, Deno.errors.TimedOut);
  assertGreaterOrEqual(stuck!.milliseconds, 1499);
});

Deno.test("serve() lets greeted clients linger for a second at most while accept() fails", async () => {
  const outOfDescriptors = new Error("Too many open files (os error 24)");
  const errors: Error[] = [];
  const { server } = start({
    timeout: 20_000,
    onAcceptError: (e) => void errors.push(e),
  });
  using _ = replaceAccept((accept) =>
    server.connections < 2 ? accept() : Promise.reject(outOfDescriptors)
  );
  const began = performance.now();
  const holders = [await connectAndStay(server), await connectAndStay(server)];
  await assertGreets(server);
  const waited = performance.now() - began;
  assertGreaterOrEqual(waited, 990);
  assertLess(waited, 10_000);
  assertGreater(errors.length, 0);
  holders.forEach((conn) => conn.close());
  await server.shutdown();
});

Deno.test("serve() pauses after a failed accept() from 5 ms on, doubled up to a second, until one succeeds", async () => {
  const pauses: (number | undefined)[] = [];
  let calls = 0;
  using _accept = replaceAccept((accept) =>
    ++calls === 11 || calls === 14
      ? accept()
      : Promise.reject(new Error("Invalid argument (os error 22)"))
  );
  using _delays = replaceDelays((ms) => {
    if (ms! > 640 && ms! < 1000) return ms; // a deadline
    pauses.push(ms);
    return 0;
  });
  const { server } = start({ timeout: 999 });
  await assertGreets(server);
  await assertGreets(server);
  _accept[Symbol.dispose]();
  _delays[Symbol.dispose]();
  await server.shutdown();
  assertEquals(
    pauses.slice(0, 12),
    [5, 10, 20, 40, 80, 160, 320, 640, 1000, 1000, 5, 10],
  );
});

Deno.test("serve() accepts again as soon as a connection has ended", async () => {
  const failed = Promise.withResolvers<Error>();
  const { server } = start({ onAcceptError: failed.resolve });
  using _accept = replaceAccept((accept) =>
    server.connections < 1 ? accept() : Promise.reject(new Error("no memory"))
  );
  // The pause would last for ever.
  using _delays = replaceDelays((ms) => ms === 5 ? 1_000_000 : ms);
  const first = await connectAndStay(server);
  await failed.promise;
  first.close();
  await assertGreets(server);
  await server.shutdown();
});

Deno.test("serve() goes on after accept() has failed", async () => {
  // What Deno throws when the process is out of file descriptors.
  const outOfDescriptors = new Error("Too many open files (os error 24)");
  let failures = 3;
  using _ = replaceAccept((accept) =>
    failures-- > 0 ? Promise.reject(outOfDescriptors) : accept()
  );
  const errors: Error[] = [];
  const { server } = start({ onAcceptError: (e) => void errors.push(e) });
  await assertGreets(server);
  await server.shutdown();
  assertEquals(errors, Array(3).fill(outOfDescriptors));
});

Deno.test("serve() does not report that a client gave up before it was accepted", async () => {
  // What some systems report where Linux hands out a dead connection.
  let failures = 3;
  using _ = replaceAccept((accept) =>
    failures-- > 0
      ? Promise.reject(new Deno.errors.ConnectionAborted())
      : accept()
  );
  const errors: Error[] = [];
  const { server } = start({ onAcceptError: (e) => void errors.push(e) });
  await assertGreets(server);
  await server.shutdown();
  assertEquals(errors, []);
});

Deno.test("shutdown() resolves while accept() fails", async () => {
  const failed = Promise.withResolvers<Error>();
  using _ = replaceAccept(() => Promise.reject(new Error("no memory")));
  const { server } = start({ onAcceptError: failed.resolve });
  await failed.promise;
  _[Symbol.dispose]();
  await server.shutdown();
});

// ============================= serve(): addresses =============================

const hasIPv6 = (() => {
  try {
    Deno.listen({ hostname: "::1", port: 0 }).close();
    return true;
  } catch {
    return false;
  }
})();

Deno.test("serve() listens on every IPv4 address by default", async () => {
  await using server = serve({ port: 0 });
  assertEquals(server.addr.hostname, "0.0.0.0");
  assertGreater(server.addr.port, 0);
  await assertGreets(server);
});

Deno.test({
  name: "serve() listens on IPv6",
  ignore: !hasIPv6,
  async fn() {
    await using server = serve({ hostname: "::1", port: 0 });
    const { port } = server.addr;
    const conn = await Deno.connect({ hostname: "::1", port });
    assertEquals(await receiveText(conn), GREETING);
    await assertNotServed(server);
  },
});

Deno.test({
  name: "serve() listens on IPv6 and IPv4 together through ::",
  ignore: !hasIPv6,
  async fn() {
    await using server = serve({ hostname: "::", port: 0 });
    const { port } = server.addr;
    for (const hostname of ["::1", "127.0.0.1"]) {
      const conn = await Deno.connect({ hostname, port });
      assertEquals(await receiveText(conn), GREETING);
    }
  },
});

Deno.test("serve() hands the backlog to the kernel", async () => {
  const { listen } = Deno;
  const backlogs: unknown[] = [];
  Deno.listen = ((options: Deno.TcpListenOptions) => {
    backlogs.push(options.tcpBacklog);
    return listen(options);
  }) as unknown as typeof Deno.listen;
  try {
    await start().server.shutdown();
    await start({ backlog: 7 }).server.shutdown();
  } finally {
    Deno.listen = listen;
  }
  assertEquals(backlogs, [65535, 7]);
});

Deno.test("serve() throws where it cannot listen", async () => {
  await using server = start().server;
  const { port } = server.addr;
  const hostname = "127.0.0.1";
  assertThrows(() => serve({ hostname, port }), Deno.errors.AddrInUse);
  assertThrows( // RFC 5737: an address for documentation, never a machine's
    () => serve({ hostname: "203.0.113.1", port: 0 }),
    Deno.errors.AddrNotAvailable,
  );
  assertThrows(() => serve({ hostname: "no such name", port: 0 }));
  await assertGreets(server);
});

Deno.test("serve() names a bad option and opens nothing", () => {
  const nonsense: [unknown, Record<string, unknown[]>][] = [
    [RangeError, {
      port: [-1, 65536, 1.5, NaN, Infinity],
      backlog: [0, -1, 1.5, 2 ** 31, NaN],
      timeout: [0, -1, 0.5, 2 ** 31, NaN, Infinity],
      maxConnections: [0, -1, 1.5, 2 ** 31, NaN],
    }],
    [TypeError, {
      hostname: [null, 5, {}],
      port: [null, "9000", true],
      greeting: [null, 5, {}, [1, 2]],
      backlog: [null, "1"],
      timeout: [null, "1"],
      maxConnections: [null, "1"],
      reusePort: [null, 1, "yes"],
      signal: [5, {}, "abort"],
      onListen: [5, "log"],
      onOutcome: [5, "log"],
      onAcceptError: [5, "log"],
    }],
  ];
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr as Deno.NetAddr;
  for (const [kind, options] of nonsense) {
    for (const [name, values] of Object.entries(options)) {
      for (const value of values) {
        const error = assertThrows(() =>
          // A server that got as far as listening would find the port in use.
          serve({ hostname: "127.0.0.1", port, [name]: value })
        ) as Error;
        assertEquals(error.constructor, kind, `${name}: ${value}: ${error}`);
        assertStringIncludes(error.message, `${name} must be `);
      }
    }
  }
  listener.close();
});

Deno.test("serve() takes undefined for the default", async () => {
  await using server = serve({
    port: 0,
    greeting: undefined,
    timeout: undefined,
  });
  await assertGreets(server);
});

// ========================== serve(): starting, stopping ==========================

Deno.test("serve() calls onListen with the address", async () => {
  let addr: Deno.NetAddr | undefined;
  await using server = start({ onListen: (a) => addr = a }).server;
  assertEquals(addr, server.addr);
});

Deno.test("serve() throws what onListen throws, and listens no more", () => {
  let port = 0;
  const onListen = (addr: Deno.NetAddr) => {
    port = addr.port;
    throw new Error("not here");
  };
  assertThrows(() => start({ onListen }), Error, "not here");
  Deno.listen({ hostname: "127.0.0.1", port }).close();
});

Deno.test("serve() goes on when callbacks throw, and rejects in the end with the first error", async () => {
  let calls = 0;
  const server = serve({
    port: 0,
    onOutcome() {
      throw new Error(`call ${++calls}`);
    },
  });
  for (let i = 0; i < 3; i++) await assertGreets(server);
  await assertRejects(() => server.shutdown(), Error, "call 1");
  await assertRejects(() => server.finished, Error, "call 1");
  assertEquals(calls, 3);
});

Deno.test("serve() goes on when a callback rejects", async () => {
  const server = serve({
    port: 0,
    onOutcome: () => Promise.reject(new Error("later")),
  });
  for (let i = 0; i < 3; i++) await assertGreets(server);
  await assertRejects(() => server.shutdown(), Error, "later");
});

Deno.test("shutdown() accepts no more, lets open connections end, and can be called again", async () => {
  const { server, outcomes } = start({ greeting: LARGER_THAN_BUFFERS });
  const conn = await connect(server);
  const beginning = new Uint8Array(65536);
  const read = await conn.read(beginning);
  assertEquals(server.connections, 1);
  const first = server.shutdown();
  const second = server.shutdown();
  await refused(server);
  assertGreaterOrEqual(server.connections, 1);
  const whole = concat([beginning.subarray(0, read!), await receive(conn)]);
  assert(equals(whole, LARGER_THAN_BUFFERS));
  await Promise.all([first, second, server.finished]);
  await server.shutdown();
  assertEquals(
    outcomes.filter(({ bytes }) => bytes === whole.length).length,
    1,
  );
  assertEquals(server.connections, 0);
});

Deno.test("shutdown() greets the clients that the kernel has connected", async () => {
  const { server, outcomes } = start({ maxConnections: 1, timeout: 20_000 });
  using _first = await connectAndStay(server);
  const waiting = await Promise.all(
    Array.from({ length: 100 }, () => connect(server)),
  );
  const { shutdown } = server; // as it is handed to a signal, say
  const [texts] = await Promise.all([
    Promise.all(waiting.map(receiveText)),
    shutdown(),
  ]);
  assertEquals(texts, Array(100).fill(GREETING));
  assertEquals(outcomes.length, 101);
  await assertRejects(() => connect(server), Deno.errors.ConnectionRefused);
});

Deno.test("shutdown() greets clients in the queue behind first writes", async () => {
  const gate = Promise.withResolvers<void>();
  const full = Promise.withResolvers<void>();
  let writes = 0;
  using _ = replaceAccept(async (accept) => {
    const conn = await accept();
    const { write } = conn;
    return Object.assign(conn, {
      async write(data: Uint8Array) {
        if (++writes === 64) full.resolve();
        await gate.promise;
        return await write.call(conn, data);
      },
    });
  });
  const { server } = start();
  const conns = await Promise.all(
    Array.from({ length: 200 }, () => connect(server)),
  );
  await full.promise;
  const shutdown = server.shutdown();
  for (let i = 0; i < 10; i++) await sleep(0); // turns in which nobody comes
  gate.resolve();
  const texts = await Promise.all(conns.map(receiveText));
  assertEquals(texts, Array(200).fill(GREETING));
  await shutdown;
});

for (
  const [bound, options] of [
    ["backlog", { backlog: 100, timeout: 20_000 }],
    ["timeout", { backlog: 1_000_000, timeout: 200 }],
  ] as const
) {
  Deno.test(`shutdown() is not held up by a flood for longer than the ${bound}`, async () => {
    const clients: Promise<unknown>[] = [];
    // Whenever one is accepted, another comes.
    using _ = replaceAccept((accept, port) => {
      const client = Deno.connect({ hostname: "127.0.0.1", port });
      clients.push(client.then(receive).catch(() => {}));
      return accept();
    });
    const { server, outcomes } = start(options);
    await Promise.all(Array.from({ length: 10 }, () => assertGreets(server)));
    const before = outcomes.length;
    const began = performance.now();
    await server.shutdown();
    assertGreater(outcomes.length - before, 5);
    if (bound === "backlog") assertLess(outcomes.length - before, 300);
    assertLess(performance.now() - began, 10_000);
    await Promise.all(clients);
  });
}

Deno.test("an aborted signal ends a shutdown that still greets the queue", async () => {
  const controller = new AbortController();
  const { server } = start({
    maxConnections: 1,
    timeout: 600_000,
    signal: controller.signal,
    greeting: LARGER_THAN_BUFFERS,
  });
  const conns = [await connect(server), await connect(server)];
  await conns[0]!.read(new Uint8Array(100));
  const shutdown = server.shutdown();
  controller.abort();
  await shutdown;
  await assertRejects(() => connect(server), Deno.errors.ConnectionRefused);
  conns.forEach((conn) => conn.close());
});

Deno.test("shutdown() resolves while accepting is paused", async () => {
  const { server } = start({ maxConnections: 1, timeout: 100 });
  using conn = await connect(server);
  await conn.read(new Uint8Array(100));
  await server.shutdown();
});

Deno.test("shutdown() frees the port at once", async () => {
  const { server } = start();
  await assertGreets(server);
  await server.shutdown();
  const { port } = server.addr;
  await serve({ hostname: "127.0.0.1", port }).shutdown();
});

Deno.test("await using shuts down and waits for open connections", async () => {
  const { server, outcomes } = start({ timeout: 100 });
  using conn = await connect(server);
  {
    await using _ = server;
    await conn.read(new Uint8Array(100));
    assertEquals(server.connections, 1);
  }
  assertEquals(server.connections, 0);
  assertEquals(outcomes.length, 1);
});

Deno.test("an aborted signal stops the server and closes every connection at once", async () => {
  const controller = new AbortController();
  const { server, outcomes } = start({
    signal: controller.signal,
    greeting: LARGER_THAN_BUFFERS,
    timeout: 600_000,
  });
  const conns = [await connect(server), await connect(server)];
  for (const conn of conns) await conn.read(new Uint8Array(100));
  const reason = new Error("enough");
  controller.abort(reason);
  controller.abort(new Error("again"));
  await server.finished;
  assertEquals(outcomes.map(({ error }) => error), [reason, reason]);
  await assertNotServed(server);
  conns.forEach((conn) => conn.close());
});

Deno.test("an aborted signal closes a connection that was just accepted", async () => {
  const controller = new AbortController();
  using _ = replaceAccept(async (accept) => {
    const conn = await accept();
    controller.abort();
    return conn;
  });
  const { server, outcomes } = start({ signal: controller.signal });
  assertEquals(await receiveText(await connect(server)), "");
  await server.finished;
  assertEquals(outcomes[0]!.error?.name, "AbortError");
});

Deno.test("an aborted signal ends the wait for a greeting function", async () => {
  const controller = new AbortController();
  const asked = Promise.withResolvers<void>();
  const { server, outcomes } = start({
    signal: controller.signal,
    timeout: 600_000,
    greeting: () => {
      asked.resolve();
      return new Promise(() => {});
    },
  });
  using _conn = await connect(server);
  await asked.promise;
  const reason = new Error("enough");
  controller.abort(reason);
  await server.finished;
  assertEquals(outcomes.map(({ error }) => error), [reason]);
});

Deno.test("an aborted signal does not harm a server that has stopped", async () => {
  const controller = new AbortController();
  const { server } = start({ signal: controller.signal });
  await server.shutdown();
  controller.abort();
  await server.finished;
});

Deno.test("a signal keeps no hold of a server that has stopped", async () => {
  const listeners = new Set<unknown>();
  const signal = Object.assign(new AbortController().signal, {
    addEventListener: (_: string, f: unknown) => void listeners.add(f),
    removeEventListener: (_: string, f: unknown) => void listeners.delete(f),
  });
  const { server } = start({ signal });
  assertEquals(listeners.size, 1);
  await server.shutdown();
  assertEquals(listeners.size, 0);
});

Deno.test("serve() throws the reason of a signal that is aborted already", () => {
  const signal = AbortSignal.abort(new Error("too late"));
  const onListen = () => {
    throw new Error("listened");
  };
  assertThrows(() => serve({ port: 0, signal, onListen }), Error, "too late");
});

Deno.test("serve() stops when onListen aborts the signal", async () => {
  const controller = new AbortController();
  const { server } = start({
    signal: controller.signal,
    onListen: () => controller.abort(),
  });
  await server.finished;
  await assertNotServed(server);
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
  connect: () => Promise<Deno.TcpConn>,
  pick: <T>(...choices: T[]) => T,
): Promise<Visit> {
  const manner = pick("read", "read", "read", "stall", "part", "leave");
  const before = pick("", "", "wait", "send 10", "send 300000", "half-close");
  const pace = pick("at once", "at once", "slowly", "byte by byte");
  const conn = await connect();
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
    assertMatch(`${error}`, /reset|broken pipe|not connected/i);
  }
  const ended = performance.now();
  if (manner === "read") return { conn, received: concat(pieces), ended };
  conn.close(); // with what was not read, and so a reset
  return { ended };
}

/** A server with random options and its crowd, all from one seed. */
async function randomCrowd(seed: number, accepted: Map<number, number>) {
  const random = randomFrom(seed);
  const pick = <T>(...choices: T[]) =>
    choices[Math.floor(random() * choices.length)]!;
  const size = pick(0, 1, 18, 5000, 300_000, 4_000_000);
  const whole = LARGER_THAN_BUFFERS.subarray(seed % 1000, seed % 1000 + size);
  const timeout = pick(200, 600);
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
  const visits = await Promise.all(
    Array.from({ length: 30 }, async (_, i) => {
      if (i % 10 === 0) await connectAndReset(server.addr.port);
      return await randomVisit(() => connect(server), pick);
    }),
  );
  for (const { conn, received, ended } of visits) {
    const port = (conn?.localAddr as Deno.NetAddr | undefined)?.port;
    conn?.close();
    if (!received) continue;
    assert(equals(received, whole.subarray(0, received.length)), "wrong bytes");
    if (received.length === whole.length) continue;
    // It has lost something: then its time was up.
    const outcome = outcomes.find((o) => o.remoteAddr.port === port)!;
    const { at, milliseconds, error } = outcome;
    const deadline = error ? at - milliseconds + timeout : at + timeout;
    assertGreaterOrEqual(ended, deadline - 2, `lost bytes: ${error}`);
  }
  await server.shutdown();
  assertEquals(server.connections, 0);
  assertEquals(outcomes.length, accepted.get(server.addr.port));
}

Deno.test("serve() keeps its promise to a random crowd", async () => {
  const [given] = Deno.args.map(Number); // deno test --allow-net -- SEED
  const first = Math.floor(Math.random() * 2 ** 31);
  const seeds = given === undefined
    ? Array.from({ length: 16 }, (_, i) => first + i)
    : [given];
  const accepted = new Map<number, number>();
  using _ = replaceAccept(async (accept, port) => {
    const conn = await accept();
    accepted.set(port, (accepted.get(port) ?? 0) + 1);
    return conn;
  });
  await Promise.all(seeds.map(async (seed) => {
    try {
      await randomCrowd(seed, accepted);
    } catch (cause) {
      throw new Error(`with the seed ${seed}: ${cause}`, { cause });
    }
  }));
});

// ================================ parseFlags() ================================

Deno.test("parseFlags() leaves the defaults to serve()", () => {
  assertEquals(parseFlags([]), {
    hostname: undefined,
    port: undefined,
    greeting: undefined,
    backlog: undefined,
    timeout: undefined,
    maxConnections: undefined,
    reusePort: false,
    verbose: false,
    help: false,
    version: false,
  });
});

Deno.test("parseFlags() takes long and short flags, and the last of a repeated one", () => {
  const cases: [string, Record<string, unknown>][] = [
    ["--port 80", { port: 80 }],
    ["--port=0", { port: 0 }],
    ["-p 65535", { port: 65535 }],
    ["-p8080", { port: 8080 }],
    ["-p=8080", { port: 8080 }],
    ["-p 1 --port 2", { port: 2 }],
    ["--hostname ::1", { hostname: "::1" }],
    ["-H localhost", { hostname: "localhost" }],
    ["--greeting Hi", { greeting: "Hi\n" }],
    ["-g Hi\n", { greeting: "Hi\n" }],
    ["--greeting=-", { greeting: "-" }],
    ["-g -", { greeting: "-" }],
    ["--greeting=-v", { greeting: "-v\n" }],
    ["-g a=b", { greeting: "a=b\n" }],
    ["--greeting=a=b", { greeting: "a=b\n" }],
    ["--greeting 5", { greeting: "5\n" }],
    ["--backlog 1", { backlog: 1 }],
    ["-b 2147483647", { backlog: 2147483647 }],
    ["--timeout 2", { timeout: 2000 }],
    ["-t 0.25", { timeout: 250 }],
    ["-t .5", { timeout: 500 }],
    ["-t 0.001", { timeout: 1 }],
    ["--max-connections 7", { maxConnections: 7 }],
    ["-c 7", { maxConnections: 7 }],
    ["--reuse-port", { reusePort: true }],
    ["-r", { reusePort: true }],
    ["--verbose", { verbose: true }],
    ["-rv -p 80", { reusePort: true, verbose: true, port: 80 }],
    ["-h", { help: true }],
    ["--help", { help: true }],
    ["-V", { version: true }],
    ["--version", { version: true }],
  ];
  const defaults = parseFlags([]);
  for (const [line, expected] of cases) {
    assertEquals(
      parseFlags(line.split(" ")),
      { ...defaults, ...expected },
      line,
    );
  }
});

const BAD_COMMAND_LINES: [string[], string][] = [
  [["--port="], "--port needs a value"],
  [["--port"], "--port needs a value"],
  [["--port", ""], "--port needs a value"],
  [["--port", "-1"], "--port needs a value"],
  ...["-1", "1.5", "0x50", "1e3", " 80", "80 ", "65536", "x", "-", "١", "1_0"]
    .map((value): [string[], string] => [
      [`--port=${value}`],
      `--port must be a whole number from 0 to 65535, not "${value}"`,
    ]),
  [["--port=1\n2"], String.raw`not "1\n2"`],
  [["-p"], "--port needs a value"],
  [["-pv"], "--port needs a value"],
  [["--hostname"], "--hostname needs a value"],
  [["--greeting"], "--greeting needs a value"],
  [["--greeting", "-x"], "--greeting needs a value"],
  [["--backlog", "0"], "--backlog must be a whole number from 1 to 2147483647"],
  [["--backlog", "1.5"], `not "1.5"`],
  [
    ["-c", "0"],
    "--max-connections must be a whole number from 1 to 2147483647",
  ],
  [["-c", "2147483648"], `not "2147483648"`],
  ...["0", "0.0", "-1", "x", "1e3", "Infinity", "2147484", "1.", "1,5", "."]
    .map((value): [string[], string] => [
      [`--timeout=${value}`],
      `--timeout must be a number from 0.001 to 2147483, not "${value}"`,
    ]),
  [["--verbose=no"], `--verbose takes no value, and was given "no"`],
  [["--verbose", "yes"], `--verbose takes no value, and was given "yes"`],
  [["-vp80"], `--verbose takes no value, and was given "p80"`],
  [["--help=yes"], "--help takes no value"],
  [["--prot", "80"], `unknown flag "--prot"`],
  [["--no-port"], `unknown flag "--no-port"`],
  [["-x"], `unknown flag "-x"`],
  [["-gno=yes"], `unknown flag "-gno=yes"`],
  [["--port.x=5"], `unknown flag "--port.x=5"`],
  [["--__proto__=5"], `unknown flag "--__proto__=5"`],
  [["9000"], `stray word "9000"`],
  [[""], `stray word ""`],
  [["-"], `stray word "-"`],
  [["--", "9000"], `stray word "9000"`],
  [["two\nlines"], String.raw`stray word "two\nlines"`],
];

Deno.test("parseFlags() names what is wrong, in one line", () => {
  for (const [args, message] of BAD_COMMAND_LINES) {
    const error = assertThrows(() => parseFlags(args), UsageError);
    assertStringIncludes(error.message, message);
    assertMatch(error.message, /^[^\n]+ \(see --help\)$/);
  }
});

Deno.test("parseFlags() gives options or a usage error for any arguments", () => {
  const names = "port hostname greeting backlog timeout max-connections " +
    "reuse-port verbose help version p H g b t c r v h V x no-port _ __proto__ " +
    "constructor port.a toString";
  const pieces = [
    ...names.split(" ").flatMap((n) => [`--${n}`, `-${n}`, `--${n}=`, n]),
    ...["-", "--", "=", "", " ", "0", "1", "80", "-1", "1.5", "1e3", "99999"],
    ...["true", "false", "null", "\n", "\0", "ü", "☎", "::1", "0.0.0.0", "a=b"],
  ];
  const pick = () => pieces[Math.floor(Math.random() * pieces.length)]!;
  let parsed = 0;
  for (let i = 0; i < 20_000; i++) {
    const args = Array.from(
      { length: i % 5 },
      () => Math.random() < 0.7 ? pick() : pick() + pick(),
    );
    try {
      const flags = parseFlags(args);
      parsed++;
      const { port = 0, backlog = 1, timeout = 1, maxConnections = 1 } = flags;
      assert(Number.isInteger(port) && port >= 0 && port <= 65535);
      for (const number of [backlog, timeout, maxConnections]) {
        assert(Number.isInteger(number) && number >= 1);
      }
      assert(flags.hostname !== "" && flags.greeting !== "");
      for (const name of ["reusePort", "verbose", "help", "version"] as const) {
        assertEquals(typeof flags[name], "boolean");
      }
    } catch (error) {
      if (!(error instanceof UsageError)) throw error;
      assertMatch(error.message, /^[^\n]+$/);
    }
  }
  assertGreater(parsed, 4000);
});

/** What an option or a flag is when it is left out, as the texts say it. */
const DEFAULT_TEXTS: Record<string, string> = {
  port: `${DEFAULTS.port}`,
  hostname: DEFAULTS.hostname!,
  greeting: `${DEFAULTS.greeting}`.trimEnd(),
  backlog: `${DEFAULTS.backlog}`,
  timeout: `${DEFAULTS.timeout / 1000}`,
  "max-connections": `${DEFAULTS.maxConnections}`,
};

/** The flags of a text, as `-p, --port <port>`, and what it says of each. */
function flagsIn(text: string, entry: RegExp): Map<string, string> {
  return new Map([...text.matchAll(entry)].map(([, flag, rest]) => [
    flag!.trim(),
    rest!.replace(/\s+/g, " "),
  ]));
}

Deno.test("--help, the README, parseFlags() and serve() have the same flags and defaults", () => {
  const help = flagsIn(
    /const HELP = `([^`]*)`/.exec(source)![1]!,
    /^ {2}(-\w, --[^ ]+(?: <\w+>)?) +(.*(?:\n {10,}.*)*)/gm,
  );
  const table = flagsIn(readme, /^\| `(-\w, --[^`]+)` *\|(.*)\|$/gm);
  assertEquals([...help.keys()], [...table.keys()]);
  assertEquals(help.size, 10);
  for (const [flag, text] of help) {
    const [, short, long, value] = /-(\w), --([\w-]+)( <\w+>)?/.exec(flag)!;
    const given = value ? ["1"] : [];
    const flags = parseFlags([`--${long}`, ...given]);
    assertEquals(parseFlags([`-${short}`, ...given]), flags);
    assert(flags[toOption(long!)] !== parseFlags([])[toOption(long!)], long);
    const expected = DEFAULT_TEXTS[long!];
    assertEquals(expected !== undefined, value !== undefined, long);
    if (!expected) continue;
    assertMatch(text, new RegExp(`\\(${RegExp.escape(expected)}[,)]`));
    assertStringIncludes(
      `${table.get(flag)} `.replaceAll("`", ""),
      `| ${expected} `,
    );
  }
});

function toOption(flag: string): keyof ReturnType<typeof parseFlags> {
  return flag.replace(/-(\w)/g, (_, c) => c.toUpperCase()) as "port";
}

Deno.test("ServeOptions and DEFAULTS have the same defaults", () => {
  const options = /interface ServeOptions \{([^}]*)\n\}/.exec(source)![1]!;
  const documented = Object.fromEntries(
    [...options.matchAll(/Default: `?([^`]*?)`?\.\s(?:[^/]*?)\*\/\s+(\w+)\?:/g)]
      .map(([, value, option]) => [option, value]),
  );
  const actual = Object.fromEntries(
    Object.entries(DEFAULTS)
      .map(([option, value]) => [option, `${value}`.replace("\n", "\\n")]),
  );
  assertEquals(documented, actual);
});

Deno.test("canCutOff() is true from Deno 2.9.5 on", () => {
  for (const version of ["2.9.5", "2.9.10", "2.10.0", "3.0.0", "10.0.0"]) {
    assert(canCutOff(version), version);
  }
  for (const version of ["2.9.4", "2.8.10", "2.0.0", "1.46.3"]) {
    assert(!canCutOff(version), version);
  }
});

// ============================== The command line ==============================

const ignore = Deno.permissions.querySync({ name: "run" }).state !== "granted";

/** What runs the server: after it come the server's own arguments. */
function denoRun(...permissions: string[]): string[] {
  const server = new URL("server.ts", import.meta.url).href;
  return [Deno.execPath(), "run", "--no-prompt", ...permissions, server];
}

/** Runs a shell script to its end, with `args` as its "$@". */
async function sh(script: string, ...args: string[]) {
  const command = new Deno.Command("sh", {
    args: ["-c", script, "sh", ...args],
  });
  const { code, stdout, stderr } = await command.output();
  const [out, err] = [decode(stdout), decode(stderr)];
  return { code, stdout, out, err };
}

/** Runs the command line to its end. */
function cli(args: string[], ...permissions: string[]) {
  return sh('exec "$@" </dev/null', ...denoRun(...permissions), ...args);
}

/** Starts the command line, on a free port of 127.0.0.1 unless `args` differ. */
async function launch(
  args: string[] = [],
  { stdin = new Uint8Array(), limit = "", permission = "--allow-net" } = {},
) {
  const child = new Deno.Command("sh", {
    args: [
      "-c",
      `${limit} exec "$@"`,
      "sh",
      ...denoRun(permission),
      "-H127.0.0.1",
      "-p0",
      ...args,
    ],
    stdin: "piped",
    stdout: "null",
    stderr: "piped",
  }).spawn();
  const lines: string[] = [];
  let news = Promise.withResolvers<void>();
  const read = (async () => {
    let text = "";
    for await (
      const piece of child.stderr.pipeThrough(new TextDecoderStream())
    ) {
      text += piece;
      const complete = text.split("\n");
      text = complete.pop()!;
      lines.push(...complete);
      news.resolve();
      news = Promise.withResolvers();
    }
    news.promise.catch(() => {});
    news.reject(new Error(`The server has ended.\n${lines.join("\n")}`));
  })();
  /** Waits until standard error has so many lines. */
  async function count(number: number): Promise<void> {
    while (lines.length < number) await news.promise;
  }
  /** Waits for a line of standard error. */
  async function line(pattern: RegExp): Promise<RegExpExecArray> {
    for (let i = 0;; i++) {
      await count(i + 1);
      const match = pattern.exec(lines[i]!);
      if (match) return match;
    }
  }
  const writer = child.stdin.getWriter();
  await writer.write(stdin);
  await writer.close();
  const [, port, nc = ""] = await line(
    /^Listening on .*:(\d+) \(try: (nc .*)\)$/,
  );
  /** Waits for the end: the exit code and the last line. */
  async function end() {
    const { code } = await child.status;
    await read;
    return { code, last: lines.at(-1) };
  }
  return {
    pid: child.pid,
    /** The command of a client, as the server suggests it. */
    nc,
    lines,
    count,
    line,
    connect: () => Deno.connect({ hostname: "127.0.0.1", port: Number(port) }),
    kill: (signal: Deno.Signal) => child.kill(signal),
    end,
    stop(signal: Deno.Signal = "SIGTERM") {
      child.kill(signal);
      return end();
    },
  };
}

/** A test with processes: left out where it may not start any. */
function processTest(name: string, fn: () => Promise<void>, without = ignore) {
  Deno.test({ name: `server.ts ${name}`, ignore: without, fn });
}

processTest("greets nc, and stops on SIGINT and on SIGTERM", async () => {
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    const server = await launch();
    assertMatch(
      server.lines[0]!,
      /^Listening on 127\.0\.0\.1:(\d+) \(try: nc 127\.0\.0\.1 \1\)$/,
    );
    const silent = await sh(`${server.nc} </dev/null`);
    assertEquals(silent.out, GREETING);
    const talking = await sh(`echo Hello from nc | ${server.nc}`);
    assertEquals(talking.out, GREETING);
    assertEquals(await server.stop(signal), {
      code: 0,
      last: "Stopped: 2 greeted, 0 failed",
    });
  }
});

processTest("shows how to reach it on IPv4 and IPv6", async () => {
  const cases: [string, string, string][] = [
    ["0.0.0.0", "0.0.0.0", "localhost"],
    ["::", "[::]", "localhost"],
    ["::1", "[::1]", "::1"],
    ["localhost", "127.0.0.1", "127.0.0.1"],
  ];
  for (const [host, shown, client] of cases) {
    const server = await launch(["--hostname", host]);
    assertStringIncludes(server.lines[0]!, `Listening on ${shown}:`);
    assertStringIncludes(server.lines[0]!, `(try: nc ${client} `);
    assertEquals((await sh(`${server.nc} </dev/null`)).out, GREETING);
    assertEquals((await server.stop()).code, 0);
  }
}, ignore || !hasIPv6);

processTest(
  "sends a greeting of the user's, and adds a newline where it has none",
  async () => {
    for (
      const [args, expected] of [
        [["-g", "Hi there"], "Hi there\n"],
        [["--greeting=☎\n"], "☎\n"],
      ] as const
    ) {
      const server = await launch([...args]);
      assertEquals((await sh(`${server.nc} </dev/null`)).out, expected);
      assertEquals((await server.stop()).code, 0);
    }
  },
);

processTest("sends standard input byte for byte", async () => {
  for (const stdin of [LARGER_THAN_BUFFERS, new Uint8Array()] as const) {
    const server = await launch(["--greeting=-"], { stdin });
    assert(equals((await sh(`${server.nc} </dev/null`)).stdout, stdin));
    assertEquals(await server.stop(), {
      code: 0,
      last: "Stopped: 1 greeted, 0 failed",
    });
  }
});

processTest("says that it cannot read standard input", async () => {
  const { code, out, err } = await sh(
    'exec "$@" </',
    ...denoRun("--allow-net"),
    "-p0",
    "-g-",
  );
  assertEquals([code, out], [1, ""]);
  assertMatch(err, /^Cannot read standard input: Is a directory.*\n$/);
});

processTest("prints a line for every connection with --verbose", async () => {
  const server = await launch(["--verbose", "--timeout=0.2", "--greeting=-"], {
    stdin: LARGER_THAN_BUFFERS,
  });
  const good = await server.connect();
  const { port } = good.localAddr as Deno.NetAddr;
  await receive(good);
  await server.line(
    new RegExp(
      `^127\\.0\\.0\\.1:${port} greeted: ${LARGER_THAN_BUFFERS.length} bytes, \\d+\\.\\d ms$`,
    ),
  );
  using stuck = await server.connect();
  const { port: stuckPort } = stuck.localAddr as Deno.NetAddr;
  await server.line(
    new RegExp(
      `^127\\.0\\.0\\.1:${stuckPort} failed, not taken in 200 ms: \\d+ bytes, \\d+\\.\\d ms$`,
    ),
  );
  assertEquals(await server.stop(), {
    code: 0,
    last: "Stopped: 1 greeted, 1 failed",
  });
});

processTest(
  "answers a bad command line with one line and exit code 2",
  async () => {
    // A process for each kind of problem; the tests of parseFlags() have them all.
    for (
      const args of [
        ["--port="],
        ["-p1.5"],
        ["--bogus"],
        ["stray"],
        ["-t0"],
        ["-c0"],
        ["-b"],
        ["-v=1"],
      ]
    ) {
      const { code, out, err } = await cli(args);
      assertEquals([code, out], [2, ""], args.join(" "));
      assertMatch(err, /^[^\n]+ \(see --help\)\n$/);
    }
  },
);

processTest(
  "says in one line why it cannot listen, with exit code 1",
  async () => {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const { port } = listener.addr as Deno.NetAddr;
    const cases: [string, string[], string[], RegExp][] = [
      [
        "127.0.0.1:" + port,
        ["-H", "127.0.0.1", "-p", `${port}`],
        ["--allow-net"],
        /in use.*--port/,
      ],
      [
        "203.0.113.1:9000",
        ["-H", "203.0.113.1"],
        ["--allow-net"],
        /this machine.*--hostname/,
      ],
      [
        "no.such.host.invalid:9000",
        ["-H", "no.such.host.invalid"],
        ["--allow-net"],
        /does not resolve.*--hostname/,
      ],
      ["a\\nb:9000", ["-H", "a\nb"], ["--allow-net"], /invalid host/],
      [
        "[::1]:9000",
        ["-H", "::1"],
        ["--allow-net=0.0.0.0:9000"],
        /permission.*--allow-net/,
      ],
      ["0.0.0.0:9000", [], [], /permission.*--allow-net/],
    ];
    for (const [address, args, permissions, why] of cases) {
      const { code, out, err } = await cli(args, ...permissions);
      assertEquals([code, out], [1, ""], err);
      assertMatch(err, /^[^\n]+\n$/);
      assertStringIncludes(err, `Cannot listen on ${address}: `);
      assertMatch(err, why);
    }
  },
);

processTest("says that a port is privileged", async () => {
  const script =
    '[ "$(id -u)" = 0 ] && without="setpriv --bounding-set=-net_bind_service"; exec $without "$@"';
  const { code, out, err } = await sh(
    script,
    ...denoRun("--allow-net"),
    "-p",
    "1",
  );
  assertEquals([code, out], [1, ""]);
  assertMatch(err, /^Cannot listen on 0\.0\.0\.0:1: .*privileged.*--port.*\n$/);
}, ignore || Deno.build.os !== "linux");

processTest(
  "prints help and version to standard output, without any permission",
  async () => {
    const help = await cli(["--help"]);
    assertEquals([help.code, help.err], [0, ""]);
    assertStringIncludes(help.out, "--greeting <text>");
    const version = await cli(["-V"]);
    assertEquals([version.code, version.err], [0, ""]);
    assertEquals(version.out, `${config.name} ${config.version}\n`);
  },
);

processTest("needs no more permission than its own address", async () => {
  const permission = "--allow-net=0.0.0.0:0";
  const server = await launch(["-H", "0.0.0.0"], { permission });
  assertEquals((await sh(`${server.nc} </dev/null`)).out, GREETING);
  assertEquals(await server.stop(), {
    code: 0,
    last: "Stopped: 1 greeted, 0 failed",
  });
});

processTest(
  "lets open connections end when told to stop, and says what it waits for",
  async () => {
    const server = await launch(["--timeout=0.5"]);
    using conn = await server.connect();
    await conn.read(new Uint8Array(100));
    server.kill("SIGTERM");
    await server.line(
      /^Stopping: waiting for clients \(1 left\); a second signal stops at once$/,
    );
    assertEquals(await server.end(), {
      code: 0,
      last: "Stopped: 1 greeted, 0 failed",
    });
  },
);

processTest("stops within a second where clients only linger", async () => {
  const server = await launch(["--timeout=20", "--verbose"]);
  using conn = await server.connect();
  const { port } = conn.localAddr as Deno.NetAddr;
  await server.line(new RegExp(`:${port} greeted: 18 bytes, `)); // at once
  const began = performance.now();
  assertEquals(await server.stop("SIGINT"), {
    code: 0,
    last: "Stopped: 1 greeted, 0 failed",
  });
  assertLess(performance.now() - began, 10_000); // the timeout has not come
});

processTest(
  "greets the clients that the kernel has connected, and then stops",
  async () => {
    const server = await launch();
    await receive(await server.connect());
    server.kill("SIGSTOP");
    const conns = await Promise.all(
      Array.from({ length: 500 }, server.connect),
    );
    server.kill("SIGCONT");
    server.kill("SIGTERM");
    const texts = await Promise.all(conns.map(receiveText));
    assertEquals(texts, Array(500).fill(GREETING));
    assertEquals(await server.end(), {
      code: 0,
      last: "Stopped: 501 greeted, 0 failed",
    });
    await assertRejects(server.connect, Deno.errors.ConnectionRefused);
  },
);

processTest("stops at once on a second signal", async () => {
  for (
    const [first, second, expected] of [
      ["SIGINT", "SIGINT", 130],
      ["SIGINT", "SIGTERM", 143],
    ] as const
  ) {
    const server = await launch(["--timeout=1000", "--greeting=-"], {
      stdin: LARGER_THAN_BUFFERS,
    });
    using conn = await server.connect();
    await conn.read(new Uint8Array(100));
    server.kill(first);
    await server.line(/^Stopping/);
    server.kill(second);
    assertEquals(await server.end(), {
      code: expected,
      last: "Stopped: 0 greeted, 1 failed",
    });
  }
});

/** Clients that come again and again, `size` of them at once. */
function crowd(size: number, connect: () => Promise<Deno.Conn>) {
  /** What they were sent, and how often; no entry for being turned away. */
  const sent: Record<string, number> = {};
  let total = 0;
  let goal = { number: Infinity, reached: () => {} };
  let going = true;
  async function client() {
    const buffer = new Uint8Array(100);
    while (going) {
      let text = "";
      try {
        using conn = await connect();
        for (let n; (n = await conn.read(buffer)) !== null;) {
          text += decode(buffer.subarray(0, n));
        }
      } catch {
        // Refused, or reset in the queue; but not in the midst of a greeting.
        if (text === "") continue;
      }
      sent[text] = (sent[text] ?? 0) + 1;
      if (++total === goal.number) goal.reached();
    }
  }
  const clients = Array.from({ length: size }, client);
  return {
    sent,
    /** Waits until so many more were sent something. */
    more: (number: number) =>
      new Promise<void>((reached) =>
        goal = { number: total + number, reached }
      ),
    async leave() {
      going = false;
      await Promise.all(clients);
    },
  };
}

/** A server ended well, and counted no fewer than its clients did. */
function assertLostNobody(end: { code: number; last?: string }, sent: number) {
  const count = /^Stopped: (\d+) greeted, 0 failed$/.exec(end.last!);
  assertGreaterOrEqual(Number(count?.[1]), sent);
  assertEquals(end.code, 0);
}

processTest(
  "loses no accepted client when it is stopped under load",
  async () => {
    const server = await launch(["--timeout=1"]); // bounds the stop, too
    const clients = crowd(64, server.connect);
    await clients.more(2000);
    const end = await server.stop();
    await clients.leave();
    assertEquals(Object.keys(clients.sent), [GREETING]);
    assertLostNobody(end, clients.sent[GREETING]!);
  },
);

processTest(
  "lives through a want of file descriptors, and greets all in the end",
  async () => {
    const began = performance.now();
    const server = await launch(["--timeout=20"], { limit: "ulimit -n 64;" });
    const conns = await Promise.all(
      Array.from({ length: 200 }, server.connect),
    );
    for (const conn of conns) { // they read, but never close
      assertEquals(await conn.read(new Uint8Array(100)), GREETING.length);
    }
    assertEquals(await server.stop(), {
      code: 0,
      last: "Stopped: 200 greeted, 0 failed",
    });
    conns.forEach((conn) => conn.close());
    const complaints = server.lines.filter((line) =>
      line.startsWith("Cannot accept")
    );
    assertMatch(complaints[0]!, /^Cannot accept.*Too many open files/);
    assertLessOrEqual(
      complaints.length,
      1 + (performance.now() - began) / 1000,
    );
  },
);

processTest(
  "holds waiting clients in little memory, and gives every descriptor back",
  async () => {
    const clients = 2000;
    const server = await launch(["--timeout=3"]);
    const figures = async () => {
      const { out } = await sh(
        `awk '/VmRSS/ { print $2 }' /proc/${server.pid}/status; ls /proc/${server.pid}/fd | wc -l`,
      );
      const [kilobytes = NaN, descriptors = NaN] = out.split("\n").map(Number);
      return { kilobytes, descriptors };
    };
    for (let i = 0; i < 500; i++) await receive(await server.connect()); // warm up
    const before = await figures();
    const conns = await Promise.all(
      Array.from({ length: clients }, server.connect),
    );
    for (const conn of conns) await conn.read(new Uint8Array(100));
    const during = await figures();
    assertEquals(during.descriptors - before.descriptors, clients);
    assertLess((during.kilobytes - before.kilobytes) / clients, 10);
    // They never close: the server does, at the deadline.
    while ((await figures()).descriptors > before.descriptors);
    assertEquals((await figures()).descriptors, before.descriptors);
    conns.forEach((conn) => conn.close());
    assertEquals((await server.stop()).code, 0);
  },
  ignore || Deno.build.os !== "linux",
);

processTest("shares a port between processes with --reuse-port", async () => {
  const first = await launch([
    "--reuse-port",
    "--greeting=first",
    "--timeout=1",
  ]);
  const port = first.nc.split(" ").at(-1);
  const args = ["--reuse-port", "--greeting=second", `--port=${port}`];
  const second = await launch(args);
  const clients = crowd(32, first.connect);
  const { sent } = clients;
  await clients.more(1000);
  assertGreater(sent["first\n"]!, 100);
  assertGreater(sent["second\n"]!, 100);

  const end = await first.stop(); // in their midst
  await clients.more(200);
  await clients.leave();
  assertLostNobody(end, sent["first\n"]!);
  assertLostNobody(await second.stop(), sent["second\n"]!);
  assertEquals(Object.keys(sent).sort(), ["first\n", "second\n"]);
}, ignore || Deno.build.os !== "linux");

// ================================= Benchmarks =================================

const MESSAGE = new TextEncoder().encode(GREETING);
const SINK = new Uint8Array(262144);

/** What examples show: no half-close, no drain, no deadline. */
async function bare(conn: Deno.TcpConn) {
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
      ["bare loop", () => loop(bare)],
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
