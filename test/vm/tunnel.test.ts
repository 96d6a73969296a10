import { randomBytes } from "node:crypto"
import * as net from "node:net"
import { afterAll, assert, layer } from "@effect/vitest"
import { Chunk, Effect, Fiber, Scope, Stream } from "effect"
import { cli, freePort, Guest, guest, settled, sh, sha256, startCli, temporaryHome, text } from "../fixtures.ts"

const home = temporaryHome()
afterAll(() => settled(home))

const mib = 2 ** 20

/** Servers of the guest, each on a port of its own. */
const servers = `
import hashlib, os, socket, struct, threading
def all_of(c):
    digest = hashlib.sha256()
    while piece := c.recv(65536): digest.update(piece)
    return digest.hexdigest().encode()
def echo(c):
    while piece := c.recv(65536): c.sendall(piece)
def digest(c): c.sendall(all_of(c))
def speaks_first(c):
    c.sendall(b"first"); c.shutdown(socket.SHUT_WR)
    open("/tmp/heard", "wb").write(all_of(c))
def endless(c):
    while True: c.sendall(bytes(65536))
def resets(c):
    c.recv(1); c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
def notes_reset(c):
    c.sendall(b"x")
    try: end = "end" if c.recv(1) == b"" else "byte"
    except ConnectionResetError: end = "reset"
    open("/tmp/noted", "w").write(end)
def attend(serve, c):
    with c:
        try: serve(c)
        except OSError: pass
def listen(server, serve):
    while True: threading.Thread(target=attend, args=(serve, server.accept()[0]), daemon=True).start()
def tcp(port, family=socket.AF_INET, address="127.0.0.1"):
    s = socket.socket(family); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind((address, port)); s.listen(128); return s
unix = socket.socket(socket.AF_UNIX); unix.bind("/tmp/echo.sock"); unix.listen(128)
all = [(tcp(7001), echo), (tcp(7002), digest), (tcp(7003), speaks_first), (tcp(7004), endless), (tcp(7005), resets),
  (tcp(7006), notes_reset), (tcp(7007, socket.AF_INET6, "::1"), echo), (unix, echo)]
for server, serve in all[1:]: threading.Thread(target=listen, args=(server, serve), daemon=True).start()
print("ready", flush=True)
listen(*all[0])
`

interface Ended {
  readonly bytes: Buffer
  readonly error: string | undefined
}

/** Connects to this host as any program would. */
const dial = (port: number, host = "127.0.0.1"): Effect.Effect<net.Socket, never, Scope.Scope> =>
  Effect.acquireRelease(
    Effect.async<net.Socket>((resume) => {
      const socket = net.connect({ host, port, allowHalfOpen: true }, () => resume(Effect.succeed(socket)))
      socket.on("error", (error) => resume(Effect.die(error)))
    }),
    (socket) => Effect.sync(() => socket.destroy())
  )

/** Everything that comes until the other side ends or breaks it. */
const ending = (socket: net.Socket): Effect.Effect<Ended> =>
  Effect.async((resume) => {
    const chunks: Array<Buffer> = []
    const done = (error?: NodeJS.ErrnoException) =>
      resume(Effect.succeed({ bytes: Buffer.concat(chunks), error: error?.code }))
    socket.on("data", (chunk: Buffer) => chunks.push(chunk))
    socket.once("error", done).once("end", () => done())
  })

/** Sends everything, ends, and reads to the end. */
const exchange = (port: number, input: Uint8Array, host?: string) =>
  Effect.scoped(
    Effect.gen(function* () {
      const socket = yield* dial(port, host)
      const answer = yield* Effect.fork(ending(socket))
      yield* Effect.yieldNow()
      socket.end(input)
      return yield* Fiber.join(answer)
    })
  )

/** Starts the servers, which end with the scope. */
const serving = Effect.gen(function* () {
  const vm = yield* Guest
  yield* sh(vm, "rm -f /tmp/echo.sock /tmp/heard /tmp/noted")
  const running = yield* vm.start({ argv: ["python3", "-c", servers] })
  yield* Stream.runHead(Stream.filter(running.output, ({ bytes }) => text(bytes).includes("ready")))
  return vm
})

/** A server has done something of its own accord. */
const untilGuestHas = (file: string, content: string) =>
  Effect.gen(function* () {
    const vm = yield* Guest
    const wait = `until [ "$(cat ${file} 2>/dev/null)" = ${content} ]; do sleep 0.02; done`
    yield* vm.exec(wait, { timeout: "25 seconds" })
  })

layer(guest(home, { image: "debian" }), { excludeTestServices: true, timeout: 60_000 })("a tunnel", (it) => {
  it.scoped("carries 10 MiB both ways unchanged, to a port, an IPv6 port and a unix socket", () =>
    Effect.gen(function* () {
      const vm = yield* serving
      const bytes = randomBytes(10 * mib)
      for (const target of [{ port: 7001 }, { port: 7007 }, { path: "/tmp/echo.sock" }]) {
        const { hostAddress, hostPort } = yield* vm.tunnel({ guest: target })
        assert.strictEqual(hostAddress, "127.0.0.1")
        const back = yield* exchange(hostPort, bytes)
        assert.deepStrictEqual([back.error, sha256(back.bytes)], [undefined, sha256(bytes)])
      }
    })
  )

  it.scoped("passes on each side's end alone", () =>
    Effect.gen(function* () {
      const vm = yield* serving
      const bytes = randomBytes(mib + 1)
      const digest = yield* vm.tunnel({ guest: { port: 7002 } })
      assert.strictEqual(text((yield* exchange(digest.hostPort, bytes)).bytes), sha256(bytes))

      const first = yield* vm.tunnel({ guest: { port: 7003 } })
      const socket = yield* dial(first.hostPort)
      assert.deepStrictEqual(yield* ending(socket), { bytes: Buffer.from("first"), error: undefined })
      socket.end(bytes)
      yield* untilGuestHas("/tmp/heard", sha256(bytes))
    })
  )

  it.scoped("carries 50 connections at the same time, each its own", () =>
    Effect.gen(function* () {
      const vm = yield* serving
      const { hostPort } = yield* vm.tunnel({ guest: { port: 7001 } })
      const all = Array.from({ length: 50 }, (_, n) => Buffer.from(`${n} `.repeat(20_000)))
      const back = yield* Effect.forEach(all, (bytes) => exchange(hostPort, bytes), { concurrency: "unbounded" })
      assert.deepStrictEqual(
        back.map(({ bytes }) => sha256(bytes)),
        all.map(sha256)
      )
    })
  )

  it.scoped("resets a client that the guest does not take, and goes on", () =>
    Effect.gen(function* () {
      const vm = yield* serving
      const { hostPort } = yield* vm.tunnel({ guest: { port: 7099 } })
      const refused = yield* Effect.scoped(Effect.flatMap(dial(hostPort), ending))
      assert.deepStrictEqual(refused, { bytes: Buffer.alloc(0), error: "ECONNRESET" })
      const late = servers.replaceAll("7001", "7099").replace(/^all = .*\n.*$/m, "all = [(tcp(7099), echo)]")
      const running = yield* vm.start({ argv: ["python3", "-c", late.replace("/tmp/echo.sock", "/tmp/late.sock")] })
      yield* Stream.runHead(running.output)
      assert.strictEqual(text((yield* exchange(hostPort, Buffer.from("now"))).bytes), "now")
    })
  )

  it.scoped("delays no other client when a client stalls", () =>
    Effect.gen(function* () {
      const vm = yield* serving
      const endless = yield* vm.tunnel({ guest: { port: 7004 } })
      const echo = yield* vm.tunnel({ guest: { port: 7001 } })
      const stalled = yield* Effect.forEach(Array.from({ length: 5 }), () => dial(endless.hostPort))
      for (const socket of stalled)
        yield* Effect.async<void>((resume) => void socket.once("readable", () => resume(Effect.void)))
      const bytes = randomBytes(mib)
      for (let turn = 0; turn < 5; turn++) {
        assert.strictEqual(sha256((yield* exchange(echo.hostPort, bytes)).bytes), sha256(bytes))
        assert.strictEqual(yield* sh(vm, "echo responsive"), "responsive")
      }
    })
  )

  it.scoped("passes on a reset, from either side", () =>
    Effect.gen(function* () {
      const vm = yield* serving
      const resets = yield* vm.tunnel({ guest: { port: 7005 } })
      const socket = yield* dial(resets.hostPort)
      const end = yield* Effect.fork(ending(socket))
      yield* Effect.yieldNow()
      socket.write("x")
      assert.strictEqual((yield* Fiber.join(end)).error, "ECONNRESET")

      const notes = yield* vm.tunnel({ guest: { port: 7006 } })
      const client = yield* dial(notes.hostPort)
      yield* Effect.async<void>((resume) => void client.once("data", () => resume(Effect.void)))
      client.resetAndDestroy()
      yield* untilGuestHas("/tmp/noted", "reset")
    })
  )

  it.scoped("is a connection for a program, without a port of the host", () =>
    Effect.gen(function* () {
      const vm = yield* serving
      const bytes = randomBytes(3 * mib)
      const connection = yield* vm.connect({ port: 7001 })
      const reading = yield* Effect.fork(Stream.runCollect(connection.bytes))
      yield* connection.write(bytes)
      yield* connection.end
      const back = Buffer.concat(Chunk.toReadonlyArray(yield* Fiber.join(reading)))
      yield* connection.finished
      assert.strictEqual(sha256(back), sha256(bytes))
    })
  )

  it.scoped("is refused with a code", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      const closed = yield* Effect.flip(Effect.asVoid(vm.connect({ port: 7098 })))
      assert.deepStrictEqual([closed.code, closed.retryable], ["TUNNEL_REFUSED", false])
      assert.include(closed.message, "7098")
      assert.strictEqual(
        (yield* Effect.flip(Effect.asVoid(vm.connect({ path: "/tmp/none.sock" })))).code,
        "TUNNEL_REFUSED"
      )
      for (const target of [{ port: 0 }, { port: 70000 }, { port: 1.5 }, { path: "run/x.sock" }, { path: "/a\0b" }]) {
        const { code } = yield* Effect.flip(Effect.asVoid(vm.connect(target)))
        assert.strictEqual(code, "TUNNEL_TARGET_INVALID", JSON.stringify(target))
      }
      const foreign = yield* Effect.flip(vm.tunnel({ hostAddress: "192.0.2.1", guest: { port: 80 } }))
      assert.strictEqual(foreign.code, "TUNNEL_ADDRESS_INVALID")
    })
  )

  it.scoped("names the holder of a port of the host, which is free again when the scope closes", () =>
    Effect.gen(function* () {
      const vm = yield* serving
      const outer = yield* Effect.scope
      let ended: Fiber.Fiber<Ended> | undefined
      const port = yield* Effect.scoped(
        Effect.gen(function* () {
          const { hostPort } = yield* vm.tunnel({ guest: { port: 7001 } })
          const again = yield* Effect.flip(vm.tunnel({ hostPort, guest: { port: 7002 } }))
          assert.deepStrictEqual([again.code, again.retryable], ["TUNNEL_PORT_IN_USE", true])
          assert.include(again.message, `(pid ${process.pid})`)
          const client = yield* Scope.extend(dial(hostPort), outer)
          ended = yield* Effect.forkIn(ending(client), outer)
          return hostPort
        })
      )
      assert.isDefined(ended)
      yield* Fiber.join(ended)
      const { hostPort } = yield* vm.tunnel({ hostAddress: "::1", hostPort: port, guest: { port: 7001 } })
      assert.strictEqual(text((yield* exchange(hostPort, Buffer.from("six"), "::1")).bytes), "six")
    })
  )

  it.scoped("is a verb of the CLI, which ends with the VM", () =>
    Effect.gen(function* () {
      const booted = yield* cli(home, ["boot", "--detach", "--image", "debian", "--name", "served"])
      assert.strictEqual(booted.code, 0, booted.stderr)
      const script =
        "mkdir /srv/www; echo served > /srv/www/index.html; cd /srv/www; exec python3 -um http.server 80 2>&1"
      const server = yield* startCli(home, ["exec", "served", "--", "sh", "-c", script])
      yield* server.printed("Serving HTTP")
      const port = yield* freePort
      const forward = yield* startCli(home, ["forward", "--json", "served", `${port}:80`])
      yield* forward.printed("]\n")
      const get = Effect.promise(async () => (await fetch(`http://127.0.0.1:${port}/`)).text())
      assert.strictEqual(yield* get, "served\n")
      const taken = yield* cli(home, ["forward", "served", `${port}:81`])
      assert.strictEqual(taken.code, 1)
      assert.match(taken.stderr, /TUNNEL_PORT_IN_USE.*pid \d+/)
      const second = yield* startCli(home, ["forward", "served", "80"])
      yield* second.printed("ctrl-c ends it")
      yield* second.kill("SIGINT")
      assert.strictEqual((yield* second.result).code, 130)
      assert.strictEqual((yield* cli(home, ["stop", "served"])).code, 0)
      const ended = yield* forward.result
      assert.strictEqual(ended.code, 0)
      assert.include(ended.stderr, "served has ended")
      assert.deepStrictEqual(JSON.parse(ended.stdout), [
        { hostAddress: "127.0.0.1", hostPort: port, guest: { port: 80 } }
      ])
    })
  )
})
