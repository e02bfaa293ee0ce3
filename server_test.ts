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
import { concat, equals, startsWith } from "@std/bytes";
import { Socket } from "node:net";
import {
  type ConnectionEnd,
  type GreetingServer,
  parseFlags,
  serve,
  type ServeOptions,
  UsageError,
} from "./server.ts";

const GREETING = "Hello from server\n";
const LARGE = crypto.getRandomValues(new Uint8Array(65536));
/** More than the send and receive buffers of a connection take together. */
const LARGER_THAN_BUFFERS = concat(Array(320).fill(LARGE)); // 20 MiB

// =============================== Client helpers ===============================

/** A server on a free port of 127.0.0.1 that notes how its connections ended. */
function start(options: ServeOptions = {}) {
  const ends: ConnectionEnd[] = [];
  const server = serve({
    hostname: "127.0.0.1",
    port: 0,
    onConnectionEnd: (end) => void ends.push(end),
    ...options,
  });
  return { server, ends };
}

function connect(server: GreetingServer): Promise<Deno.TcpConn> {
  return Deno.connect({ hostname: "127.0.0.1", port: server.addr.port });
}

/** Reads to the end, and closes. Rejects if the connection is reset. */
function receive(conn: Deno.Conn): Promise<Uint8Array> {
  return new Response(conn.readable).bytes();
}

async function receiveText(conn: Deno.Conn): Promise<string> {
  return new TextDecoder().decode(await receive(conn));
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

function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

// ============================ serve(): the greeting ============================

Deno.test("serve() greets a client and closes the connection", async () => {
  const { server, ends } = start();
  await assertGreets(server);
  await server.shutdown();
  assertEquals(ends.length, 1);
  assertEquals(ends[0].bytes, GREETING.length);
  assertEquals(ends[0].error, undefined);
  assertEquals(ends[0].remoteAddr.hostname, "127.0.0.1");
  assertGreaterOrEqual(ends[0].milliseconds, 0);
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
  const { server, ends } = start();
  const conns = await Promise.all(
    Array.from({ length: 500 }, () => connect(server)),
  );
  const texts = await Promise.all(conns.map(receiveText));
  assertEquals(texts, Array(500).fill(GREETING));
  await server.shutdown();
  assertEquals(ends.filter((end) => !end.error).length, 500);
});

Deno.test("serve() sends a greeting larger than the socket buffers whole", async () => {
  const { server, ends } = start({ greeting: LARGER_THAN_BUFFERS });
  const received = await receive(await connect(server));
  assert(equals(received, LARGER_THAN_BUFFERS));
  await server.shutdown();
  assertEquals(ends[0].bytes, LARGER_THAN_BUFFERS.length);
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
  const { server, ends } = start({
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
  assertEquals(ends.map((end) => end.bytes), [0, 0, 0, 0, GREETING.length]);
  assertEquals(ends[0].error, bad[0]);
  assertEquals(ends[1].error?.cause, "a string");
  assertInstanceOf(ends[2].error, Error);
  assertMatch(ends[3].error!.message, /greeting must be a string or a Uint8/);
});

// ============================ serve(): the clients ============================

for (const size of [1, 1000, 100_000, 4_000_000]) {
  Deno.test(`serve() greets a client that sends ${size} bytes before it reads`, async () => {
    const { server, ends } = start();
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
    assertEquals(ends.filter((end) => end.error), []);
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
  while (await conn.read(byte) !== null) text += String.fromCharCode(byte[0]);
  assertEquals(text, GREETING);
});

Deno.test("serve() goes on when clients reset, or vanish without a word", async () => {
  const { server, ends } = start();
  for (let i = 0; i < 20; i++) {
    await connectAndReset(server.addr.port);
    (await connect(server)).close();
  }
  await assertGreets(server);
  await server.shutdown();
  assertEquals(ends.at(-1)?.bytes, GREETING.length);
});

Deno.test("serve() takes no notice of clients that reset before they are accepted", async () => {
  const acceptErrors: Error[] = [];
  const { server, ends } = start({
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
  assertEquals(ends.length, 2);
  assertEquals(acceptErrors, []);
});

Deno.test("serve() reports a client that resets while it is written to", async () => {
  const { server, ends } = start({ greeting: LARGER_THAN_BUFFERS });
  const conn = await connect(server);
  await conn.read(new Uint8Array(100));
  conn.close(); // with data unread, and so a reset
  await server.shutdown();
  assertEquals(ends.length, 1);
  assertLess(ends[0].bytes, LARGER_THAN_BUFFERS.length);
  assertMatch(ends[0].error!.message, /reset|broken pipe/i);
});

Deno.test("serve() cuts off at the timeout a client that reads nothing", async () => {
  const { server, ends } = start({
    greeting: LARGER_THAN_BUFFERS,
    timeout: 100,
  });
  using _conn = await connect(server);
  await server.shutdown();
  assertLess(ends[0].bytes, LARGER_THAN_BUFFERS.length);
  assertInstanceOf(ends[0].error, Deno.errors.TimedOut);
  assertGreaterOrEqual(ends[0].milliseconds, 99);
});

Deno.test("serve() closes at the timeout a greeted client that never closes", async () => {
  const { server, ends } = start({ timeout: 100 });
  using conn = await connect(server);
  assertEquals(await conn.read(new Uint8Array(100)), GREETING.length);
  assertEquals(await conn.read(new Uint8Array(100)), null);
  await server.shutdown();
  assertEquals(ends[0].error, undefined);
  assertGreaterOrEqual(ends[0].milliseconds, 99);
});

Deno.test("serve() keeps each deadline, also of clients that come later", async () => {
  const { server, ends } = start({ timeout: 200 });
  const conns: Deno.Conn[] = [];
  for (let i = 0; i < 5; i++) {
    conns.push(await connect(server));
    await sleep(30);
  }
  await server.shutdown();
  conns.forEach((conn) => conn.close());
  assertEquals(ends.length, 5);
  for (const end of ends) assertGreaterOrEqual(end.milliseconds, 199);
});

Deno.test("serve() closes at the timeout a client that sends for ever, and greets others meanwhile", async () => {
  const { server, ends } = start({ timeout: 500 });
  const flood = (async () => {
    using conn = await connect(server);
    const { port } = conn.localAddr as Deno.NetAddr;
    await assertRejects(async () => {
      while (true) await conn.write(LARGE);
    });
    return port;
  })();
  for (let i = 0; i < 50; i++) await assertGreets(server);
  const port = await flood;
  await server.shutdown();
  const end = ends.find((end) => end.remoteAddr.port === port);
  assertEquals(end?.error, undefined);
  assertGreaterOrEqual(end!.milliseconds, 499);
});

Deno.test("serve() holds no more than maxConnections, and greets all in turn", async () => {
  let most = 0;
  const { server, ends } = start({
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
  assertEquals(ends.length, 100);
  assertEquals(most, 10);
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
      onConnectionEnd: [5, "log"],
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
  let ends = 0;
  const server = serve({
    port: 0,
    onConnectionEnd() {
      throw new Error(`end ${++ends}`);
    },
  });
  for (let i = 0; i < 3; i++) await assertGreets(server);
  await assertRejects(() => server.shutdown(), Error, "end 1");
  await assertRejects(() => server.finished, Error, "end 1");
  assertEquals(ends, 3);
});

Deno.test("serve() goes on when a callback rejects", async () => {
  const server = serve({
    port: 0,
    onConnectionEnd: () => Promise.reject(new Error("later")),
  });
  for (let i = 0; i < 3; i++) await assertGreets(server);
  await assertRejects(() => server.shutdown(), Error, "later");
});

Deno.test("shutdown() accepts no more, lets open connections end, and can be called again", async () => {
  const { server, ends } = start({ greeting: LARGER_THAN_BUFFERS });
  const conn = await connect(server);
  await conn.read(new Uint8Array(LARGE.length));
  assertEquals(server.connections, 1);
  const first = server.shutdown();
  const second = server.shutdown();
  await assertNotServed(server);
  assertEquals(server.connections, 1);
  const rest = await receive(conn);
  assertGreater(rest.length, LARGER_THAN_BUFFERS.length - LARGE.length - 1);
  await Promise.all([first, second, server.finished]);
  await server.shutdown();
  assertEquals(ends.map((end) => end.error), [undefined]);
  assertEquals(server.connections, 0);
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
  const { server, ends } = start({ timeout: 100 });
  using conn = await connect(server);
  {
    await using _ = server;
    await conn.read(new Uint8Array(100));
    assertEquals(server.connections, 1);
  }
  assertEquals(server.connections, 0);
  assertEquals(ends.length, 1);
});

Deno.test("an aborted signal stops the server and closes every connection at once", async () => {
  const controller = new AbortController();
  const { server, ends } = start({
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
  assertEquals(ends.map((end) => end.error), [reason, reason]);
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
  const { server, ends } = start({ signal: controller.signal });
  assertEquals(await receiveText(await connect(server)), "");
  await server.finished;
  assertEquals(ends[0].error?.name, "AbortError");
});

Deno.test("an aborted signal does not harm a server that has stopped", async () => {
  const controller = new AbortController();
  const { server } = start({ signal: controller.signal });
  await server.shutdown();
  controller.abort();
  await server.finished;
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
