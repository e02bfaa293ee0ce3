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

const GREETING = "Hello from server\n";
/** 20 MiB, more than both buffers of a connection take; no part like another. */
const LARGE = new Uint8Array(
  new Uint32Array(5 << 20).map((_, i) => i).buffer,
);

// ================================== Helpers ==================================

/** A test that may not hang: what has not come in a minute never comes. */
function test(name: string, fn: () => Promise<void>, ignore = false): void {
  Deno.test({ name, fn, ignore, timeout: 60_000 });
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
  return { server, outcomes };
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

async function assertGreets(server: GreetingServer): Promise<void> {
  assertEquals(await receiveText(await connect(server)), GREETING);
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

function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** Waits for what happens at some time. */
async function until(condition: () => unknown): Promise<void> {
  while (!condition()) await sleep(1);
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

/**
 * Keeps every write of every server waiting, as a kernel without memory would,
 * until the test lets it go on.
 */
function holdWrites() {
  const held: (() => void)[] = [];
  const { [Symbol.dispose]: dispose } = replaceAccept(async (accept) => {
    const conn = await accept();
    const { write } = conn;
    return Object.assign(conn, {
      async write(data: Uint8Array) {
        await new Promise<void>((go) => held.push(go));
        return await write.call(conn, data);
      },
    });
  });
  return {
    /** Lets go those that wait, once there are `count` of them. */
    async release(count: number) {
      await until(() => held.length >= count);
      assertEquals(held.length, count);
      held.splice(0).forEach((go) => go());
    },
    held,
    [Symbol.dispose]: dispose,
  };
}

/** What Deno throws when the process is out of file descriptors. */
const outOfDescriptors = () => new Error("Too many open files (os error 24)");

// =========================== serve(): the greeting ===========================

test("serve() greets a client, closes the connection and reports it", async () => {
  const { server, outcomes } = start();
  const conn = await connect(server);
  assertEquals(await receiveText(conn), GREETING);
  await server.shutdown();
  const [{ remoteAddr, bytes, milliseconds, error }] = outcomes as [Outcome];
  assertEquals(remoteAddr, conn.localAddr);
  assertEquals([outcomes.length, bytes, error], [
    1,
    GREETING.length,
    undefined,
  ]);
  assertGreaterOrEqual(milliseconds, 0);
});

test("serve() sends bytes as they are, text as UTF-8, and nothing else", async () => {
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

test("serve() greets many clients at once", async () => {
  const { server, outcomes } = start();
  const conns = await times(500, () => connect(server));
  const texts = await Promise.all(conns.map(receiveText));
  assertEquals(texts, Array(500).fill(GREETING));
  await server.shutdown();
  assertEquals(outcomes.filter(({ error }) => !error).length, 500);
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
  using writes = holdWrites();
  const buffer = new Uint8Array(1);
  await using server = start({
    greeting() {
      buffer[0]!++;
      return buffer;
    },
  }).server;
  const conns = await times(5, () => connect(server));
  await writes.release(1);
  await writes.release(4);
  const received = await Promise.all(conns.map(receive));
  assertEquals(received.map(([byte]) => byte).sort(), [1, 2, 3, 4, 5]);
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
  const reason = new Error("no quote today");
  const bad: (() => Greeting | Promise<Greeting>)[] = [
    () => {
      throw reason;
    },
    () => {
      throw "a string";
    },
    () => {
      throw undefined;
    },
    () => 5 as unknown as string,
    () => Promise.reject(reason),
  ];
  const greetings = [...bad];
  const { server, outcomes } = start({
    greeting: () => greetings.shift()?.() ?? GREETING,
  });
  for (const _ of bad) {
    assertEquals(await receiveText(await connect(server)), "");
  }
  await assertGreets(server);
  await server.shutdown();
  assertEquals(
    outcomes.map(({ bytes }) => bytes),
    [0, 0, 0, 0, 0, GREETING.length],
  );
  const errors = outcomes.map(({ error }) => error);
  assertEquals([errors[0], errors[4], errors[5]], [reason, reason, undefined]);
  assertEquals(errors[1]?.cause, "a string");
  assertInstanceOf(errors[2], Error);
  assertMatch(errors[3]!.message, /greeting must be a string or a Uint8Array/);
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

test("serve() cuts off at the timeout a client whose greeting function never answers", async () => {
  const late = Promise.withResolvers<string>();
  const { server, outcomes } = start({
    timeout: 100,
    greeting: () => late.promise,
  });
  assertEquals(await receiveText(await connect(server)), "");
  late.reject(new Error("nobody waits for this any more"));
  await server.shutdown();
  assertEquals(outcomes.length, 1);
  assertInstanceOf(outcomes[0]!.error, Deno.errors.TimedOut);
  assertGreaterOrEqual(outcomes[0]!.milliseconds, 100);
});

// ============================ serve(): the clients ============================

for (const size of [1, 1000, 100_000, 4_000_000]) {
  test(`serve() greets a client that sends ${size} bytes before it reads`, async () => {
    const { server, outcomes } = start();
    const texts = await times(20, async () => {
      const conn = await connect(server);
      await send(conn, size);
      return await receiveText(conn);
    });
    assertEquals(texts, Array(20).fill(GREETING));
    await server.shutdown();
    assertEquals(outcomes.filter(({ error }) => error), []);
  });
}

test("serve() sends a large greeting to a client that sends as much before it reads", async () => {
  await using server = start({ greeting: LARGE }).server;
  const conn = await connect(server);
  await send(conn, LARGE.length);
  assert(equals(await receive(conn), LARGE));
});

test("serve() sends a large greeting to a client that has closed its half before", async () => {
  await using server = start({ greeting: LARGE }).server;
  const conn = await connect(server);
  await conn.closeWrite();
  assert(equals(await receive(conn), LARGE));
});

test("serve() shows a client the end while the client's own half is open", async () => {
  await using server = start().server;
  using conn = await connectAndStay(server);
  assertEquals(await conn.read(new Uint8Array(1)), null);
  await conn.write(new Uint8Array(1)); // to a server that still reads
});

test("serve() goes on when clients reset, or vanish without a word", async () => {
  await using server = start().server;
  for (let i = 0; i < 20; i++) {
    await connectAndReset(server.addr.port);
    (await connect(server)).close();
  }
  await assertGreets(server);
});

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
  assertEquals(await receiveText(last), GREETING);
  await server.shutdown();
  assertEquals([outcomes.length, acceptErrors.length], [2, 0]);
});

test("serve() reports a client that resets while it is written to", async () => {
  const { server, outcomes } = start({ greeting: LARGE });
  await connectAndReset(server.addr.port, 100);
  await server.shutdown();
  assertEquals(outcomes.length, 1);
  assertLess(outcomes[0]!.bytes, LARGE.length);
  assertMatch(outcomes[0]!.error!.message, /reset|broken pipe/i);
});

test("serve() counts a client as greeted that resets right after its greeting", async () => {
  const { server, outcomes } = start();
  await times(20, () => connectAndReset(server.addr.port, GREETING.length));
  await server.shutdown();
  assertEquals(
    outcomes.map(({ bytes, error }) => [bytes, error]),
    Array(20).fill([GREETING.length, undefined]),
  );
});

test("serve() reports a client when it is greeted, not when it closes", async () => {
  const greeted = Promise.withResolvers<Outcome>();
  await using server = start({ onOutcome: greeted.resolve }).server;
  using conn = await connect(server);
  assertEquals((await greeted.promise).remoteAddr, conn.localAddr);
  assertEquals(server.connections, 1);
});

// =========================== serve(): the deadlines ===========================

test("serve() cuts off clients that read nothing, each at its timeout", async () => {
  const { server, outcomes } = start({ greeting: LARGE, timeout: 200 });
  const conns: Deno.Conn[] = [];
  for (let i = 0; i < 5; i++) {
    conns.push(await connect(server));
    await sleep(30); // not to be in one tick
  }
  await server.shutdown();
  conns.forEach((conn) => conn.close());
  assertEquals(outcomes.length, 5);
  for (const { error, bytes, milliseconds } of outcomes) {
    assertInstanceOf(error, Deno.errors.TimedOut);
    assertLess(bytes, LARGE.length);
    assertGreaterOrEqual(milliseconds, 200);
  }
});

test("serve() never calls greeted a client that it has cut off", async () => {
  using writes = holdWrites();
  const { server, outcomes } = start({ timeout: 50 });
  using _conn = await connect(server);
  await until(() => outcomes.length > 0);
  await writes.release(1); // as if the kernel had taken all in the same moment
  await server.shutdown();
  await sleep(0);
  assertEquals(outcomes.length, 1);
  assertInstanceOf(outcomes[0]!.error, Deno.errors.TimedOut);
});

for (
  const [timeout, atLeast] of [[200, 200], [20_000, 1000]] as const
) {
  test(`serve() lets a greeted client linger for ${atLeast} ms with a timeout of ${timeout}`, async () => {
    const { server, outcomes } = start({
      timeout,
      greeting: () => sleep(150).then(() => GREETING), // part of the timeout
    });
    using conn = await connectAndStay(server);
    const greeted = performance.now();
    await until(() => server.connections === 0);
    const lingered = performance.now() - greeted;
    assertGreaterOrEqual(lingered, atLeast - 10); // it read that a little late
    assertLess(lingered, 10_000); // the longer timeout has not come
    assertEquals(await conn.read(new Uint8Array(1)), null);
    await server.shutdown();
    assertEquals(outcomes.map(({ error }) => error), [undefined]);
  });
}

test("serve() closes a client that sends for ever, and greets others meanwhile", async () => {
  const { server, outcomes } = start({ timeout: 500 });
  const conn = await connect(server);
  const flood = assertRejects(async () => {
    while (true) await conn.write(LARGE);
  });
  for (let i = 0; i < 50; i++) await assertGreets(server);
  await flood;
  conn.close();
  await server.shutdown();
  assertEquals(outcomes.filter(({ error }) => !error).length, 51);
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
  const { server } = start({ timeout: 100 });
  await assertGreets(server);
  await assertGreets(server);
  await server.shutdown();
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

test("serve() lets nobody wait for greeted clients for longer than a second or so", async () => {
  await using server = start({ maxConnections: 10, timeout: 20_000 }).server;
  const began = performance.now();
  const holders = await times(10, () => connectAndStay(server));
  await assertGreets(server);
  assertLess(performance.now() - began, 10_000); // the timeout has not come
  holders.forEach((conn) => conn.close());
});

test("serve() gives who still waits for its greeting all of the timeout", async () => {
  let clients = 0;
  const { server, outcomes } = start({
    maxConnections: 2,
    timeout: 1500,
    greeting: () => clients++ === 0 ? LARGE : GREETING,
  });
  using _stuck = await connect(server);
  using _holder = await connectAndStay(server);
  await assertGreets(server);
  await server.shutdown();
  const [holder, next, stuck] = outcomes;
  assertEquals([holder?.error, next?.error], [undefined, undefined]);
  assertInstanceOf(stuck?.error, Deno.errors.TimedOut);
  assertGreaterOrEqual(stuck!.milliseconds, 1500);
});

// ========================= serve(): accept() and groups =========================

test("serve() goes on after accept() has failed, and reports it", async () => {
  const failures = [outOfDescriptors(), outOfDescriptors(), outOfDescriptors()];
  const left = [...failures];
  using _ = replaceAccept((accept) =>
    left.length > 0 ? Promise.reject(left.shift()) : accept()
  );
  const errors: Error[] = [];
  const { server } = start({ onAcceptError: (e) => void errors.push(e) });
  await assertGreets(server);
  await server.shutdown();
  assertEquals(errors, failures);
});

test("serve() does not report that a client gave up before it was accepted", async () => {
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

test("serve() waits for a while before it calls an accept() again that fails", async () => {
  let calls = 0;
  using accept = replaceAccept(() => {
    calls++;
    return Promise.reject(outOfDescriptors());
  });
  const { server } = start();
  const began = performance.now();
  await until(() => calls >= 10); // never, if it went round without a pause
  assertGreaterOrEqual(performance.now() - began, 9 * 9);
  accept[Symbol.dispose]();
  await assertGreets(server);
  await server.shutdown();
});

test("serve() accepts while first writes are held up, and writes in closed groups", async () => {
  using writes = holdWrites();
  const { server, outcomes } = start();
  const conns = [await connect(server)];
  await until(() => writes.held.length === 1);
  conns.push(...await times(200, () => connect(server)));
  await until(() => server.connections === 201);
  await writes.release(1); // the first, alone
  await until(() => writes.held.length === 200);
  conns.push(...await times(3, () => connect(server)));
  await until(() => server.connections >= 203);
  writes.held.splice(0, 199).forEach((go) => go());
  await until(() => outcomes.length === 200);
  await writes.release(1); // the last of them; the newcomers wait for it
  await writes.release(3);
  const texts = await Promise.all(conns.map(receiveText));
  assertEquals(texts, Array(204).fill(GREETING));
  await server.shutdown();
});

test("serve() puts the answers of greeting functions into groups, too", async () => {
  using writes = holdWrites();
  const answer = Promise.withResolvers<string>();
  await using server = start({ greeting: () => answer.promise }).server;
  const conns = await times(10, () => connect(server));
  await until(() => server.connections === 10);
  answer.resolve(GREETING);
  await writes.release(1);
  await writes.release(9);
  const texts = await Promise.all(conns.map(receiveText));
  assertEquals(texts, Array(10).fill(GREETING));
});

test("serve() cuts off a client that waits for its group, and goes on with the next", async () => {
  using writes = holdWrites();
  const { server, outcomes } = start({ timeout: 100 });
  const conns = await times(3, () => connect(server));
  await until(() => outcomes.length === 3);
  assertEquals(server.connections, 0);
  for (const { error } of outcomes) {
    assertInstanceOf(error, Deno.errors.TimedOut);
  }
  await writes.release(1);
  await writes.release(2);
  const next = assertGreets(server);
  await writes.release(1);
  await next;
  await server.shutdown();
  conns.forEach((conn) => conn.close());
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

test("serve() listens on every IPv4 address by default", async () => {
  await using server = serve({ port: 0 });
  assertEquals(server.addr.hostname, "0.0.0.0");
  assertGreater(server.addr.port, 0);
  await assertGreets(server);
});

test("serve() listens on IPv6 alone", async () => {
  await using server = serve({ hostname: "::1", port: 0 });
  const { port } = server.addr;
  const conn = await Deno.connect({ hostname: "::1", port });
  assertEquals(await receiveText(conn), GREETING);
  await assertRefuses(server);
}, !hasIPv6);

test(
  "serve() listens on IPv6 and IPv4 through ::, and shows IPv4 addresses as such",
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
  !hasIPv6,
);

test("serve() hands the backlog to the kernel", async () => {
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

test("serve() throws where it cannot listen", async () => {
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

test("serve() names a bad option and opens nothing", async () => {
  const numbers = [0, -1, 1.5, 2 ** 31, NaN, Infinity];
  const nonsense: [unknown, Record<string, unknown[]>][] = [
    [RangeError, {
      port: [-1, 65536, 1.5, NaN, Infinity],
      backlog: numbers,
      timeout: numbers,
      maxConnections: numbers,
    }],
    [TypeError, {
      port: [null, "9000", true],
      backlog: [null, "1"],
      timeout: [null, "1"],
      maxConnections: [null, "1"],
      greeting: [null, 5, {}, [1, 2]],
    }],
  ];
  // A server that got as far as listening would find the port in use.
  await using server = start().server;
  const { hostname, port } = server.addr;
  for (const [kind, options] of nonsense) {
    for (const [name, values] of Object.entries(options)) {
      for (const value of values) {
        const error = assertThrows(() =>
          serve({ hostname, port, [name]: value })
        ) as Error;
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
    backlog: undefined,
    timeout: undefined,
    maxConnections: undefined,
    reusePort: undefined,
    signal: undefined,
    onOutcome: undefined,
    onAcceptError: undefined,
  });
  await assertGreets(server);
});

// ============================ serve(): callbacks ============================

test("serve() goes on when callbacks fail, and their errors are uncaught ones", async () => {
  const uncaught: string[] = [];
  const note = (event: ErrorEvent | PromiseRejectionEvent) => {
    event.preventDefault();
    const error = event instanceof ErrorEvent ? event.error : event.reason;
    uncaught.push(error.message);
  };
  addEventListener("error", note);
  addEventListener("unhandledrejection", note);
  let failures = 1;
  using _ = replaceAccept((accept) =>
    failures-- > 0 ? Promise.reject(outOfDescriptors()) : accept()
  );
  let calls = 0;
  const server = serve({
    port: 0,
    onOutcome() {
      calls++;
      if (calls === 1) throw new Error("thrown");
      return Promise.reject(new Error("rejected"));
    },
    onAcceptError() {
      throw new Error("accept");
    },
  });
  try {
    await assertGreets(server);
    await assertGreets(server);
    await server.shutdown();
    await until(() => uncaught.length >= 3);
  } finally {
    removeEventListener("error", note);
    removeEventListener("unhandledrejection", note);
  }
  assertEquals(uncaught, ["accept", "thrown", "rejected"]);
  assertEquals(server.connections, 0);
});

// ============================= serve(): stopping =============================

test("shutdown() accepts no more, lets open connections end, and can be called again", async () => {
  const { server, outcomes } = start({ greeting: LARGE });
  const conn = await connect(server);
  const beginning = new Uint8Array(65536);
  const read = await conn.read(beginning);
  const first = server.shutdown();
  const second = server.shutdown();
  let refused = false;
  while (!refused) {
    try {
      (await connect(server)).close();
      await sleep(10); // whoever comes in every turn holds up the end
    } catch {
      refused = true;
    }
  }
  assertGreaterOrEqual(server.connections, 1);
  const whole = concat([beginning.subarray(0, read!), await receive(conn)]);
  assert(equals(whole, LARGE));
  await Promise.all([first, second, server.finished, server.shutdown()]);
  const greeted = outcomes.filter(({ bytes }) => bytes === whole.length);
  assertEquals([server.connections, greeted.length], [0, 1]);
});

for (
  const [name, options, clients] of [
    ["while there is no room", { maxConnections: 1 }, 100],
    // Linux queues one more than the backlog.
    ["as many as it takes", { maxConnections: 1, backlog: 1 }, 2],
  ] as const
) {
  test(`shutdown() greets the clients that the kernel has connected, ${name}`, async () => {
    const { server, outcomes } = start({ ...options, timeout: 20_000 });
    using _first = await connectAndStay(server);
    const waiting = await times(clients, () => connect(server));
    const { shutdown } = server; // as it is handed to a signal, say
    const shut = shutdown();
    const texts = await Promise.all(waiting.map(receiveText));
    assertEquals(texts, Array(clients).fill(GREETING));
    await shut;
    assertEquals(outcomes.length, clients + 1);
    await assertRefuses(server);
  });
}

test("shutdown() greets the clients that the kernel has connected, after failures of accept()", async () => {
  let failing = true;
  let failures = 0;
  using _ = replaceAccept((accept) => {
    if (!failing) return accept();
    failures++;
    return Promise.reject(outOfDescriptors());
  });
  const { server } = start({ backlog: 10 });
  const waiting = await times(10, () => connect(server));
  const shut = server.shutdown();
  await until(() => failures > 30);
  failing = false;
  const texts = await Promise.all(waiting.map(receiveText));
  assertEquals(texts, Array(10).fill(GREETING));
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
  // The flood comes from this process: without the bound it would outrun it.
  const { server, outcomes } = start({ timeout: 200, maxConnections: 50 });
  await until(() => outcomes.length >= 10);
  const before = outcomes.length;
  const began = performance.now();
  await server.shutdown();
  assertGreater(outcomes.length - before, 5);
  assertGreaterOrEqual(performance.now() - began, 200);
  await Promise.all(clients);
});

test("shutdown() frees the port at once", async () => {
  const { server } = start();
  await assertGreets(server);
  await server.shutdown();
  const { port } = server.addr;
  await serve({ hostname: "127.0.0.1", port }).shutdown();
});

test("await using shuts down and waits for open connections", async () => {
  const { server, outcomes } = start({ timeout: 100 });
  using conn = await connect(server);
  {
    await using _ = server;
    await conn.read(new Uint8Array(100));
    assertEquals(server.connections, 1);
  }
  assertEquals([server.connections, outcomes.length], [0, 1]);
});

// ============================= serve(): aborting =============================

const REASON = new Error("enough");

/** A server whose clients would keep it for ever, and what aborts it. */
function startAbortable(options: ServeOptions = {}) {
  const controller = new AbortController();
  const { signal } = controller;
  const abort = () => controller.abort(REASON);
  return { abort, ...start({ timeout: 600_000, signal, ...options }) };
}

const NEVER = new Promise<never>(() => {});

test("an aborted signal closes those that are being written to, at once", async () => {
  const { server, outcomes, abort } = startAbortable({ greeting: LARGE });
  const conns = await times(2, () => connect(server));
  for (const conn of conns) await conn.read(new Uint8Array(100));
  abort();
  abort();
  await server.finished;
  assertEquals(outcomes.map(({ error }) => error), [REASON, REASON]);
  await assertRefuses(server);
  conns.forEach((conn) => conn.close());
});

test("an aborted signal closes greeted clients that linger, at once", async () => {
  using writes = holdWrites();
  const { server, outcomes, abort } = startAbortable();
  const conn = await connect(server);
  await writes.release(1);
  await until(() => outcomes.length === 1);
  abort();
  assertEquals(server.connections, 0);
  await server.finished;
  assertEquals(outcomes.map(({ error }) => error), [undefined]);
  assertEquals(await receiveText(conn), GREETING);
});

test("an aborted signal closes those that wait for their group", async () => {
  using writes = holdWrites();
  const { server, outcomes, abort } = startAbortable();
  const conns = await times(5, () => connect(server));
  await until(() => server.connections === 5);
  abort();
  await server.finished;
  assertEquals(outcomes.map(({ error }) => error), Array(5).fill(REASON));
  await writes.release(1);
  await writes.release(4);
  assertEquals(outcomes.length, 5);
  conns.forEach((conn) => conn.close());
});

test("an aborted signal closes a connection that is just being accepted", async () => {
  using _ = replaceAccept(async (accept) => {
    const conn = await accept();
    abort();
    return conn;
  });
  const { server, outcomes, abort } = startAbortable();
  assertEquals(await receiveText(await connect(server)), "");
  await server.finished;
  assertEquals(outcomes.map(({ error }) => error), [REASON]);
});

for (
  const [when, greeting] of [
    ["while it is called", (abort: () => void) => abort()],
    ["while it is awaited", (abort: () => void) => setTimeout(abort)],
  ] as const
) {
  test(`an aborted signal ends the wait for a greeting function, ${when}`, async () => {
    const { server, outcomes, abort } = startAbortable({
      greeting() {
        greeting(abort);
        return NEVER;
      },
    });
    using _conn = await connect(server);
    await server.finished;
    assertEquals(outcomes.map(({ error }) => error), [REASON]);
  });
}

test("a signal that is aborted in onOutcome closes all others", async () => {
  const outcomes: Outcome[] = [];
  let calls = 0;
  const { server, abort } = startAbortable({
    greeting: () => ++calls === 3 ? GREETING : NEVER,
    onOutcome(outcome) {
      outcomes.push(outcome);
      abort();
    },
  });
  const slow = await times(2, () => connect(server));
  await until(() => server.connections === 2);
  slow.push(await connect(server));
  await server.finished;
  slow.forEach((conn) => conn.close());
  const errors = outcomes.map(({ error }) => error);
  assertEquals(errors, [undefined, REASON, REASON]);
});

test("an aborted signal ends the pause after a failed accept()", async () => {
  let failures = 1;
  using _ = replaceAccept((accept) =>
    failures-- > 0 ? Promise.reject(outOfDescriptors()) : accept()
  );
  const { server, abort } = startAbortable({ onAcceptError: () => abort() });
  await server.finished;
  await assertRefuses(server);
});

test("an aborted signal ends a shutdown that still greets the queue", async () => {
  const { server, abort } = startAbortable({
    maxConnections: 1,
    greeting: LARGE,
  });
  const conns = await times(2, () => connect(server));
  await until(() => server.connections === 1);
  const shutdown = server.shutdown();
  abort();
  await shutdown;
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

test("serve() throws the reason of a signal that is aborted already", async () => {
  await using server = start().server; // whose port would be in use
  const { hostname, port } = server.addr;
  const signal = AbortSignal.abort(REASON);
  assertThrows(() => serve({ hostname, port, signal }), Error, "enough");
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
  const whole = LARGE.subarray(seed % 1000, seed % 1000 + size);
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
  assertEquals(outcomes.length, accepted.get(server.addr.port));
}

test("serve() keeps its promise to a random crowd, with one outcome for each client", async () => {
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
  backlog: 65535,
  timeout: 5000,
  maxConnections: 10000,
  reusePort: false,
  verbose: false,
  help: false,
  version: false,
};

test("parseFlags() takes long and short flags, and the last of a repeated one", async () => {
  const cases: [string, Partial<typeof NO_FLAGS>][] = [
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
    ["-t 1.0015", { timeout: 1002 }],
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
  assertEquals(await parseFlags([]), NO_FLAGS);
  for (const [line, expected] of cases) {
    const flags = await parseFlags(line.split(" "));
    assertEquals(flags, { ...NO_FLAGS, ...expected }, line);
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

test("parseFlags() names what is wrong, in one line", async () => {
  for (const [args, message] of BAD_COMMAND_LINES) {
    const error = await assertRejects(() => parseFlags(args)) as Error;
    assertStringIncludes(error.message, message);
    assertMatch(error.message, /^[^\n]+$/);
  }
});

test("parseFlags() gives valid options or one line for any arguments", async () => {
  const names = "port hostname greeting backlog timeout max-connections " +
    "reuse-port verbose help version p H g b t c r v h V x no-port _ __proto__ " +
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
      assertEquals(error.constructor, Error, `${args}: ${error}`);
      assertMatch(error.message, /^[^\n]+$/);
    });
    if (!flags) continue;
    parsed++;
    // Checks the options first, and then throws the reason.
    assertThrows(() => serve({ ...flags, signal }), Error, "enough");
    assert(flags.hostname !== "" && flags.greeting !== "");
    for (const name of ["reusePort", "verbose", "help", "version"] as const) {
      assertEquals(typeof flags[name], "boolean");
    }
  }
  assertGreater(parsed, 4000);
});

// ============================== The command line ==============================

const ignore = Deno.permissions.querySync({ name: "run" }).state !== "granted";
const onLinux = Deno.build.os === "linux";

/** What runs the server: after it come the server's own arguments. */
function denoRun(...permissions: string[]): string[] {
  const server = new URL("server.ts", import.meta.url).href;
  return [Deno.execPath(), "run", "--no-prompt", ...permissions, server];
}

/** Runs a shell script to its end, with `args` as its "$@". */
async function sh(script: string, ...args: string[]) {
  const command = new Deno.Command("sh", {
    args: ["-c", script, "sh", ...args],
    stdin: "null",
  });
  const { code, stdout, stderr } = await command.output();
  return { code, stdout, out: decode(stdout), err: decode(stderr) };
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
  return {
    end,
    lines,
    /** Waits for a line. */
    async line(pattern: RegExp): Promise<RegExpExecArray> {
      const found = () =>
        lines().map((line) => pattern.exec(line)).find((match) => match);
      await until(() => found() || over);
      const match = found();
      if (!match) throw new Error(`no line ${pattern}: ${text}`);
      return match;
    },
  };
}

const LISTENING = /^Listening on .*:(\d+) \(try: (nc .*)\)$/;

/** Starts the command line, on a free port of 127.0.0.1 unless `args` differ. */
async function launch(
  args: string[] = [],
  { stdin = new Uint8Array(), limit = "", permission = "--allow-net" } = {},
) {
  const command = [...denoRun(permission), "-H127.0.0.1", "-p0", ...args];
  const child = new Deno.Command("sh", {
    args: ["-c", `${limit} exec "$@"`, "sh", ...command],
    stdin: "piped",
    stdout: "null",
    stderr: "piped",
  }).spawn();
  const log = watch(child.stderr);
  const writer = child.stdin.getWriter();
  await writer.write(stdin);
  await writer.close();
  const [, port, nc = ""] = await log.line(LISTENING);
  return {
    ...log,
    pid: child.pid,
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

/** A test with processes: left out where it may not start any. */
function processTest(name: string, fn: () => Promise<void>, where = true) {
  test(`server.ts ${name}`, fn, ignore || !where);
}

processTest("greets nc, and stops on SIGINT and on SIGTERM", async () => {
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    const server = await launch();
    assertMatch(
      server.lines()[0]!,
      /^Listening on 127\.0\.0\.1:(\d+) \(try: nc 127\.0\.0\.1 \1\)$/,
    );
    const silent = await sh(`${server.nc} </dev/null`);
    assertEquals(silent.out, GREETING);
    const talking = await sh(`echo Hello from nc | ${server.nc}`);
    assertEquals(talking.out, GREETING);
    assertEquals(await server.stop(signal), stopped(2));
  }
});

for (
  const [host, shown, client, isIPv6] of [
    ["0.0.0.0", "0.0.0.0", "127.0.0.1", false],
    ["localhost", "127.0.0.1", "127.0.0.1", false],
    ["::", "[::]", "::1", true],
    ["::1", "[::1]", "::1", true],
  ] as const
) {
  processTest(
    `shows how to reach it on ${host}, with a command that works`,
    async () => {
      const server = await launch(["--hostname", host]);
      assertStringIncludes(server.lines()[0]!, `Listening on ${shown}:`);
      assertStringIncludes(server.lines()[0]!, `(try: nc ${client} `);
      assertEquals((await sh(`${server.nc} </dev/null`)).out, GREETING);
      assertEquals(await server.stop(), stopped(1));
    },
    hasIPv6 || !isIPv6,
  );
}

for (
  const [what, args, stdin, expected] of [
    ["a greeting, and adds a newline", ["-g", "Hi there"], "", "Hi there\n"],
    ["a greeting that has its newline", ["--greeting=☎\n"], "", "☎\n"],
    ["standard input as it is", ["--greeting=-"], "220 ready\r\n", null],
    ["20 MiB of standard input", ["--greeting=-"], LARGE, null],
  ] as const
) {
  processTest(`sends ${what}`, async () => {
    const bytes = typeof stdin === "string"
      ? new TextEncoder().encode(stdin)
      : stdin;
    const server = await launch([...args], { stdin: bytes });
    const { stdout } = await sh(`${server.nc} </dev/null`);
    if (expected) assertEquals(decode(stdout), expected);
    else assert(equals(stdout, bytes));
    assertEquals(await server.stop(), stopped(1));
  });
}

for (
  const [what, stdin, why] of [
    ["empty", "</dev/null", "it is empty"],
    ["no file", "</", "Is a directory"],
  ] as const
) {
  processTest(`says that standard input is ${what}`, async () => {
    const command = [...denoRun("--allow-net"), "-p0", "--greeting=-"];
    const { code, out, err } = await sh(`exec "$@" ${stdin}`, ...command);
    assertEquals([code, out], [1, ""]);
    assertMatch(err, /^[^\n]+\n$/);
    assertStringIncludes(err, `Cannot read standard input: ${why}`);
  });
}

processTest("prints a line for every connection with --verbose", async () => {
  const args = ["--verbose", "--timeout=0.2", "--greeting=-"];
  const server = await launch(args, { stdin: LARGE });
  const good = await server.connect();
  await receive(good);
  using stuck = await server.connect();
  for (
    const [conn, how] of [
      [good, `greeted: ${LARGE.length} bytes`],
      [stuck, String.raw`failed, not greeted in 200 ms: \d+ bytes`],
    ] as const
  ) {
    const { port } = conn.localAddr as Deno.NetAddr;
    const line = `^127\\.0\\.0\\.1:${port} ${how}, \\d+\\.\\d ms$`;
    await server.line(new RegExp(line));
  }
  assertEquals(await server.stop(), stopped(1, 1));
});

processTest(
  "answers a bad command line with one line and exit code 2",
  async () => {
    // A process for each kind of problem; the tests of parseFlags() have them all.
    const kinds = ["--port=", "-p1.5", "--bogus", "stray", "-t0", "-b", "-v=1"];
    await times(kinds.length, async (i) => {
      const run = await sh('exec "$@"', ...denoRun(), kinds[i]!);
      assertEquals([run.code, run.out], [2, ""], kinds[i]);
      assertMatch(run.err, /^[^\n]+ \(see --help\)\n$/);
    });
  },
);

processTest(
  "says in one line why it cannot listen, with exit code 1",
  async () => {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const { port } = listener.addr as Deno.NetAddr;
    const any = "--allow-net";
    const cases: [string, number, string, string][] = [
      ["127.0.0.1", port, any, "Address already in use (os error"],
      ["203.0.113.1", 9000, any, "Cannot assign requested address"],
      ["no.such.host.invalid", 9000, any, "failed to lookup address"],
      ["a b", 9000, any, "invalid host"],
      ["::1", 9000, "--allow-net=0.0.0.0", "Requires net access"],
      ["0.0.0.0", 9000, "--no-remote", "run again with the --allow-net flag"],
    ];
    for (const [host, port, permission, why] of cases) {
      const args = ["-H", host.replace(" ", "\n"), "-p", `${port}`];
      const run = await sh('exec "$@"', ...denoRun(permission), ...args);
      assertEquals([run.code, run.out], [1, ""], run.err);
      assertMatch(run.err, /^[^\n]+\n$/);
      const address = host.includes(":") ? `[${host}]` : host;
      assertStringIncludes(run.err, `Cannot listen on ${address}:${port}: `);
      assertStringIncludes(run.err, why);
    }
  },
);

processTest("says that a port is privileged", async () => {
  // Docker's default has no such ports.
  const lowest = await sh("cat /proc/sys/net/ipv4/ip_unprivileged_port_start");
  if (Number(lowest.out) <= 1) return;
  const { code, out, err } = await sh(
    '[ "$(id -u)" = 0 ] && without="setpriv --bounding-set=-net_bind_service"; exec $without "$@"',
    ...denoRun("--allow-net"),
    "-p1",
  );
  assertEquals([code, out], [1, ""]);
  assertMatch(err, /^Cannot listen on 0\.0\.0\.0:1: Permission denied.*\n$/);
}, onLinux);

processTest(
  "prints help and version to standard output, without any permission",
  async () => {
    const [help, version, full] = await Promise.all([
      sh('exec "$@"', ...denoRun(), "--help"),
      sh('exec "$@"', ...denoRun(), "-V"),
      sh('exec "$@" >/dev/full', ...denoRun(), "--help"),
    ]);
    assertEquals([help.code, help.err], [0, ""]);
    assertStringIncludes(readme, `\`\`\`\n${help.out}\`\`\`\n`);
    assertEquals([version.code, version.err], [0, ""]);
    assertEquals(version.out, `${config.name} ${config.version}\n`);
    assertEquals(full.code, 1);
    assertMatch(
      full.err,
      /^Cannot write to standard output: No space[^\n]*\n$/,
    );
  },
  onLinux,
);

processTest("needs no more permission than its own address", async () => {
  const permission = "--allow-net=0.0.0.0:0";
  const server = await launch(["-H", "0.0.0.0"], { permission });
  assertEquals((await sh(`${server.nc} </dev/null`)).out, GREETING);
  assertEquals(await server.stop(), stopped(1));
});

processTest(
  "is imported by path into a project of the strictest kind",
  async () => {
    const options = [
      "allowUnreachableCode allowUnusedLabels".split(" ").map((
        o,
      ) => [o, false]),
      ("erasableSyntaxOnly exactOptionalPropertyTypes isolatedDeclarations " +
        "noFallthroughCasesInSwitch noImplicitOverride noImplicitReturns " +
        "noPropertyAccessFromIndexSignature noUncheckedIndexedAccess " +
        "noUnusedLocals noUnusedParameters strict verbatimModuleSyntax")
        .split(" ").map((o) => [o, true]),
    ].flat();
    const compilerOptions = Object.fromEntries(options);
    const path = new URL("server.ts", import.meta.url).pathname;
    const program = (from: string) => `
import { serve } from "${from}";
await using server = serve({ hostname: "127.0.0.1", port: 0 });
const conn = await Deno.connect({ port: server.addr.port });
console.log(await new Response(conn.readable).text());
`;
    const { code, out, err } = await sh(
      `dir=$(mktemp -d) && trap 'rm -r "$dir"' EXIT && cd "$dir" && cp "$2" . &&
      printf %s "$3" >deno.json && printf %s "$4" >path.ts && printf %s "$5" >copy.ts &&
      "$1" check server.ts path.ts copy.ts && "$1" run --allow-net path.ts &&
      "$1" run --allow-net copy.ts && printf '{}' >deno.json &&
      "$1" check server.ts path.ts copy.ts && "$1" run --allow-net copy.ts`,
      Deno.execPath(),
      path,
      JSON.stringify({ compilerOptions }),
      program(path),
      program("./server.ts"),
    );
    assertEquals([code, out], [0, `${GREETING}\n`.repeat(3)], err);
  },
);

// ========================= The command line: stopping =========================

processTest(
  "lets open connections end when told to stop, and says what it waits for",
  async () => {
    const server = await launch(["--timeout=20"]);
    using conn = await server.connect();
    await conn.read(new Uint8Array(100));
    const began = performance.now();
    server.kill("SIGINT");
    await server.line(
      /^Stopping: waiting for clients \(1 left\); a second signal ends it$/,
    );
    assertEquals(await server.ended(), stopped(1));
    assertLess(performance.now() - began, 10_000); // the timeout has not come
  },
);

processTest("is ended by a second signal as any process", async () => {
  const args = ["--timeout=1000", "--greeting=-"];
  const server = await launch(args, { stdin: LARGE });
  using conn = await server.connect();
  await conn.read(new Uint8Array(100));
  server.kill("SIGINT");
  await server.line(/^Stopping/);
  let over = false;
  const ended = server.ended().finally(() => over = true);
  while (!over) { // it takes a second one from half a second later on
    server.kill("SIGTERM");
    await sleep(100);
  }
  const { code, signal, last } = await ended;
  assertEquals([code, signal], [143, "SIGTERM"]);
  assertMatch(last!, /^Stopping/);
});

processTest("takes one Ctrl-C for one, under deno task too", async () => {
  const size = 20_000_000;
  // On a terminal of its own, where Ctrl-C goes to all processes.
  const task = `"${Deno.execPath()}" task start -p0 --greeting=-`;
  const child = new Deno.Command("script", {
    args: ["-qec", `head -c ${size} /dev/zero | ${task}`, "/dev/null"],
    cwd: new URL(".", import.meta.url),
    stdin: "piped",
    stdout: "piped",
  }).spawn();
  const terminal = watch(child.stdout);
  const keyboard = child.stdin.getWriter();
  const [, port] = await terminal.line(LISTENING);
  const conn = await Deno.connect({ port: Number(port) });
  assertEquals(await conn.read(new Uint8Array(1)), 1);
  await keyboard.write(new TextEncoder().encode("\x03"));
  await terminal.line(/Stopping: /);
  assertEquals((await receive(conn)).length, size - 1);
  await terminal.line(/^Stopped: 1 greeted, 0 failed$/);
  await keyboard.close();
  await Promise.all([child.status, terminal.end]);
}, onLinux);

processTest("says when it reads the greeting from a terminal", async () => {
  const command = [...denoRun("--allow-net"), "-p0", "--greeting=-"];
  const child = new Deno.Command("script", {
    args: ["-qec", `"${command.join('" "')}"`, "/dev/null"],
    stdin: "piped",
    stdout: "piped",
  }).spawn();
  const terminal = watch(child.stdout);
  const keyboard = child.stdin.getWriter();
  await terminal.line(/^Reading the greeting from the terminal; Ctrl-D /);
  await keyboard.write(new TextEncoder().encode("Hello\n\x04"));
  const [, port] = await terminal.line(LISTENING);
  const conn = await Deno.connect({ port: Number(port) });
  assertEquals(await receiveText(conn), "Hello\n");
  await keyboard.write(new TextEncoder().encode("\x03"));
  await terminal.line(/Stopped: 1 greeted, 0 failed$/);
  await keyboard.close();
  await Promise.all([child.status, terminal.end]);
}, onLinux);

processTest(
  "greets the clients that the kernel has connected, and then stops",
  async () => {
    const server = await launch();
    await receive(await server.connect());
    server.kill("SIGSTOP");
    const conns = await times(500, server.connect);
    server.kill("SIGCONT");
    server.kill("SIGTERM");
    const texts = await Promise.all(conns.map(receiveText));
    assertEquals(texts, Array(500).fill(GREETING));
    assertEquals(await server.ended(), stopped(501));
    await assertRejects(server.connect, Deno.errors.ConnectionRefused);
  },
);

for (const act of ["send", "leave"] as const) {
  processTest(
    `greets clients that stand behind a thousand that ${act}, and then stops`,
    async () => {
      const server = await launch();
      const greeted = await times(1000, server.connect);
      for (const conn of greeted) await conn.read(new Uint8Array(100));
      server.kill("SIGSTOP");
      for (const conn of greeted) {
        if (act === "send") await conn.write(new Uint8Array(100));
        else conn.close();
      }
      const waiting = await times(200, server.connect);
      server.kill("SIGCONT");
      server.kill("SIGTERM");
      const texts = await Promise.all(waiting.map(receiveText));
      assertEquals(texts, Array(200).fill(GREETING));
      if (act === "send") greeted.forEach((conn) => conn.close());
      assertEquals(await server.ended(), stopped(1200));
    },
  );
}

processTest(
  "cuts nobody off for time in which it was suspended itself",
  async () => {
    const args = ["--timeout=2", "--greeting=-"];
    const server = await launch(args, { stdin: LARGE });
    const conn = await server.connect();
    const beginning = new Uint8Array(100);
    await conn.read(beginning);
    server.kill("SIGSTOP");
    await sleep(2500);
    server.kill("SIGCONT");
    assertEquals((await receive(conn)).length, LARGE.length - 100);
    assertEquals(await server.stop(), stopped(1));
  },
);

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
  const clients = Promise.all(Array.from({ length: size }, client));
  const total = () => Object.values(sent).reduce((a, b) => a + b, 0);
  return {
    sent,
    /** Waits until so many more were sent something. */
    async more(number: number) {
      const goal = total() + number;
      await until(() => total() >= goal);
    },
    /**
     * Ends it, when all servers have ended. The kernel may have forgotten a client
     * that came as a listener was closed: that one would wait for ever.
     */
    async leave() {
      going = false;
      const timer = setTimeout(() => {
        for (const conn of open) conn[Symbol.dispose]();
      }, 2000);
      await clients;
      clearTimeout(timer);
    },
  };
}

/** A server ended well, and counted no fewer than its clients did. */
function assertLostNobody(end: { code: number; last?: string }, sent = NaN) {
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
    assertLostNobody(end, clients.sent[GREETING]);
  },
);

processTest("shares a port between processes with --reuse-port", async () => {
  const args = ["--reuse-port", "--timeout=1"];
  const first = await launch([...args, "--greeting=first"]);
  const port = first.nc.split(" ").at(-1);
  const second = await launch([...args, "--greeting=second", `--port=${port}`]);
  const clients = crowd(32, first.connect);
  const { sent } = clients;
  await until(() => sent["first\n"]! > 100 && sent["second\n"]! > 100);
  const ends = [await first.stop()]; // in their midst
  await clients.more(200);
  ends.push(await second.stop());
  await clients.leave();
  assertLostNobody(ends[0]!, sent["first\n"]);
  assertLostNobody(ends[1]!, sent["second\n"]);
  assertEquals(Object.keys(sent).sort(), ["first\n", "second\n"]);
}, onLinux);

// ====================== The command line: its surroundings ======================

processTest(
  "lives through a want of file descriptors, and greets all in the end",
  async () => {
    const began = performance.now();
    const server = await launch(["--timeout=20"], { limit: "ulimit -n 64;" });
    const conns = await times(200, server.connect);
    for (const conn of conns) { // they read, but never close
      assertEquals(await conn.read(new Uint8Array(100)), GREETING.length);
    }
    assertEquals(await server.stop(), stopped(200));
    conns.forEach((conn) => conn.close());
    const complaints = server.lines().filter((line) =>
      /^Cannot accept, trying again: Too many open files/.test(line)
    );
    assertGreater(complaints.length, 0);
    // One a second.
    assertLess(complaints.length, 2 + (performance.now() - began) / 1000);
  },
);

processTest(
  "holds waiting clients in little memory, and gives every descriptor back",
  async () => {
    const clients = 1000;
    const args = ["--timeout=4", "--greeting=-"];
    const server = await launch(args, { stdin: LARGE });
    const figures = async () => {
      const { out } = await sh(
        `awk '/VmRSS/ { print $2 }' /proc/${server.pid}/status; ls /proc/${server.pid}/fd | wc -l`,
      );
      const [kilobytes = NaN, descriptors = NaN] = out.split("\n").map(Number);
      return { kilobytes, descriptors };
    };
    const { descriptors } = await figures();
    await times(500, async () => (await server.connect()).close()); // warms it up
    while ((await figures()).descriptors > descriptors);
    const before = await figures();
    const conns = await times(clients, server.connect);
    for (const conn of conns) await conn.read(new Uint8Array(100));
    const during = await figures();
    assertEquals(during.descriptors - descriptors, clients);
    assertLess((during.kilobytes - before.kilobytes) / clients, 20);
    // They never take the rest: the server closes at the deadline.
    while ((await figures()).descriptors > descriptors);
    conns.forEach((conn) => conn.close());
    assertEquals((await server.stop()).code, 0);
  },
  onLinux,
);

/** Greets `count` clients, 50 at once. */
async function greetMany(connect: () => Promise<Deno.Conn>, count: number) {
  for (let i = 0; i < count; i += 50) {
    const texts = await times(50, async () => receiveText(await connect()));
    assertEquals(texts, Array(50).fill(GREETING));
  }
}

processTest("writes every line of a log that is read", async () => {
  const server = await launch(["--verbose"]);
  await greetMany(server.connect, 3000);
  assertEquals(await server.stop(), stopped(3000));
  assertEquals(server.lines().length, 3002);
});

processTest(
  "greets on and stops while the reader of its log stalls",
  async () => {
    const child = new Deno.Command("sh", {
      args: ["-c", 'exec "$@"', "sh", ...denoRun("--allow-net"), "-p0", "-v"],
      stderr: "piped",
    }).spawn();
    const reader = child.stderr.getReader();
    const { value } = await reader.read(); // and no more
    const [, port] = LISTENING.exec(decode(value!).trim())!;
    await greetMany(() => Deno.connect({ port: Number(port) }), 4000);
    child.kill("SIGTERM");
    assertEquals((await child.status).code, 0);
    await reader.cancel();
  },
);

for (const where of ["/dev/full", "&-"]) {
  processTest(
    `greets on and stops where its log goes to ${where}`,
    async () => {
      // The port is printed nowhere: one that was free a moment ago.
      using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
      const { port } = listener.addr as Deno.NetAddr;
      listener.close();
      const command = [...denoRun("--allow-net"), "-v", `-p${port}`];
      const child = new Deno.Command("sh", {
        args: ["-c", `exec "$@" 2>${where}`, "sh", ...command],
      }).spawn();
      let conn: Deno.Conn | undefined;
      while (!conn) conn = await Deno.connect({ port }).catch(() => undefined);
      assertEquals(await receiveText(conn), GREETING);
      await greetMany(() => Deno.connect({ port }), 100);
      child.kill("SIGTERM");
      assertEquals((await child.status).code, 0);
    },
    onLinux,
  );
}

processTest(
  "greets on and stops when the reader of its log has gone",
  async () => {
    const child = new Deno.Command("sh", {
      args: ["-c", 'exec "$@"', "sh", ...denoRun("--allow-net"), "-p0", "-v"],
      stderr: "piped",
    }).spawn();
    const reader = child.stderr.getReader();
    const { value } = await reader.read();
    const [, port] = LISTENING.exec(decode(value!).trim())!;
    await reader.cancel();
    await greetMany(() => Deno.connect({ port: Number(port) }), 100);
    child.kill("SIGTERM");
    assertEquals((await child.status).code, 0);
  },
);

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
