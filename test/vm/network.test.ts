import { createHash, randomBytes } from "node:crypto"
import * as http from "node:http"
import type * as net from "node:net"
import * as path from "node:path"
import { afterEach, assert, describe, it } from "@effect/vitest"
import { Effect, Schedule, type Scope, Stream } from "effect"
import { Machinen } from "../../src/Machinen.ts"
import type { Vm } from "../../src/vm/Vm.ts"
import {
  boot,
  cli,
  eventually,
  freePort,
  leftovers,
  live,
  newBundle,
  nothing,
  processesOf,
  settled,
  sh,
  sha256,
  temporaryHome
} from "../fixtures.ts"

const home = temporaryHome()
afterEach(() => settled(home))
const run = <A, E>(program: Effect.Effect<A, E, Machinen | Scope.Scope>) => Effect.provide(program, live(home))

const gvproxies = () => processesOf(home).filter(({ argv }) => argv.includes("gvproxy -mtu"))

/** A web server on the host's 127.0.0.1: answers with `content`, or with the sha256 of what it was sent. */
const hostServer = (content: Buffer) =>
  Effect.acquireRelease(
    Effect.async<http.Server>((resume) => {
      const server = http.createServer((request, response) => {
        if (request.method !== "POST") return response.end(content)
        const hash = createHash("sha256")
        request.on("data", (chunk) => hash.update(chunk)).on("end", () => response.end(hash.digest("hex")))
      })
      server.listen(0, "127.0.0.1", () => resume(Effect.succeed(server)))
    }),
    (server) => Effect.sync(() => server.close().closeAllConnections())
  ).pipe(Effect.map((server) => (server.address() as net.AddressInfo).port))

/** What a server says; fails with the error's code. */
const get = (url: string) =>
  Effect.async<Buffer, string>((resume) => {
    const request = http.get(url, { agent: false, timeout: 20_000 }, (response) => {
      const chunks: Array<Buffer> = []
      response.on("data", (chunk: Buffer) => chunks.push(chunk))
      response.on("end", () => resume(Effect.succeed(Buffer.concat(chunks))))
    })
    request.on("timeout", () => request.destroy(Object.assign(new Error(), { code: "ETIMEDOUT" })))
    request.on("error", (error: NodeJS.ErrnoException) => resume(Effect.fail(error.code ?? error.message)))
    return Effect.sync(() => request.destroy())
  })

/** A web server in the guest, with one page of these bytes. */
const serve = (vm: Vm, port: number, page: Uint8Array) =>
  Effect.zipRight(vm.writeFile("/www/index.html", Stream.make(page)), sh(vm, `httpd -p ${port} -h /www`))

describe("the network", () => {
  it.scopedLive("has no gvproxy before it is needed, and nothing of it stays", () =>
    run(
      Effect.gen(function* () {
        const port = yield* freePort
        const vm = yield* boot({ portForward: [{ hostPort: port, guestPort: 80 }] })
        yield* serve(vm, 80, Buffer.from("a guest's page"))
        assert.deepStrictEqual(gvproxies(), [])
        assert.strictEqual(String(yield* get(`http://127.0.0.1:${port}/`)), "a guest's page")
        assert.lengthOf(gvproxies(), 1)
        yield* vm.stop()
        assert.deepStrictEqual(leftovers(home), nothing)
        assert.strictEqual(yield* Effect.flip(get(`http://127.0.0.1:${port}/`)), "ECONNREFUSED")
      })
    )
  )

  it.scopedLive(
    "forwards are clients of the guest's port: many at once, of IPv6 too, and refused when it is closed",
    () =>
      run(
        Effect.gen(function* () {
          const page = randomBytes(1 << 20)
          const [first, second, closed] = [yield* freePort, yield* freePort, yield* freePort]
          const vm = yield* boot({
            portForward: [
              { hostPort: first, guestPort: 8080 },
              { hostPort: second, guestPort: 8080, hostAddr: "::1" },
              { hostPort: closed, guestPort: 9 }
            ]
          })
          yield* serve(vm, 8080, page)
          const urls = Array.from({ length: 24 }, (_, i) => (i % 2 === 0 ? `127.0.0.1:${first}` : `[::1]:${second}`))
          const pages = yield* Effect.forEach(urls, (host) => get(`http://${host}/`), { concurrency: 24 })
          assert.deepStrictEqual(new Set(pages.map(sha256)), new Set([sha256(page)]))
          assert.strictEqual(yield* Effect.flip(get(`http://127.0.0.1:${closed}/`)), "ECONNRESET")
        })
      )
  )

  it.scopedLive("the guest reaches the host's own programs by address and by name, and sends and receives whole", () =>
    run(
      Effect.gen(function* () {
        const content = randomBytes(8 << 20)
        const port = yield* hostServer(content)
        const vm = yield* boot()
        const fetched = `wget -q -O - http://192.168.127.254:${port}/ | sha256sum | cut -d' ' -f1`
        assert.strictEqual(yield* sh(vm, fetched), sha256(content))
        const upload =
          "base64 /dev/urandom | head -c 8000000 >/tmp/up; sha256sum </tmp/up | cut -d' ' -f1 && wget -q -O - --post-file=/tmp/up"
        const [mine, theirs] = (yield* sh(vm, `${upload} http://host.machinen.internal:${port}/`)).split("\n")
        assert.strictEqual(theirs, mine)
        assert.include(yield* sh(vm, "nslookup gateway.machinen.internal"), "192.168.127.1")
      })
    )
  )

  it.scopedLive("the gateway answers as a name server only: no port of the host can be opened through it", () =>
    run(
      Effect.gen(function* () {
        const vm = yield* boot({ image: "debian" })
        const target = yield* freePort
        const ask = `
import json, socket, http.client
def tcp(host, port):
    s = socket.socket(); s.settimeout(5)
    try:
        s.connect((host, port)); return True
    except OSError:
        return False
    finally:
        s.close()
open_ = [p for p in [*range(1, 1200), 7777, 8080, 8081, 9090] if tcp("192.168.127.1", p)]
said = []
for host in ("192.168.127.1", "gateway.machinen.internal"):
    for path in ("/services/forwarder/expose", "/forwarder/expose", "/services/dns/add", "/tunnel?ip=127.0.0.1&port=22"):
        try:
            c = http.client.HTTPConnection(host, 80, timeout=5)
            c.request("POST", path, json.dumps({"local": "127.0.0.1:${target}", "remote": "192.168.127.2:80", "protocol": "tcp"}))
            said.append(c.getresponse().status)
        except OSError as e:
            said.append(type(e).__name__)
print(json.dumps([open_, sorted(set(map(str, said)))]))
`
        const { exitCode, stderr, stdout } = yield* vm.execRaw({ argv: ["python3", "-c", ask] })
        assert.strictEqual(exitCode, 0, String(stderr))
        assert.deepStrictEqual(JSON.parse(Buffer.from(stdout).toString()), [[53], ["ConnectionRefusedError"]])
        assert.strictEqual(yield* Effect.flip(get(`http://127.0.0.1:${target}/`)), "ECONNREFUSED")
      })
    )
  )

  it.scopedLive("comes back after gvproxy was killed: the VM goes on, and says so", () =>
    run(
      Effect.gen(function* () {
        const [port, host] = [yield* freePort, yield* hostServer(Buffer.from("the host"))]
        const vm = yield* boot({ portForward: [{ hostPort: port, guestPort: 80 }] })
        yield* serve(vm, 80, Buffer.from("the guest"))
        // what ends soon after it was started is begun again after a pause, in which clients are turned away
        const again = Schedule.upTo(Schedule.spaced("100 millis"), "10 seconds")
        for (let round = 0; round < 3; round++) {
          assert.strictEqual(String(yield* Effect.retry(get(`http://127.0.0.1:${port}/`), again)), "the guest")
          assert.strictEqual(yield* sh(vm, `wget -q -O - http://192.168.127.254:${host}/`), "the host")
          const [victim] = gvproxies()
          assert.isDefined(victim)
          process.kill(victim.pid, "SIGKILL")
          yield* eventually("its end", () => gvproxies().every(({ pid }) => pid !== victim.pid))
        }
        // a client of the guest's alone brings it back too
        assert.strictEqual(yield* sh(vm, `wget -q -O - http://192.168.127.254:${host}/`), "the host")
        const console = yield* vm.logs("console").pipe(Stream.decodeText(), Stream.mkString)
        assert.lengthOf(console.match(/machinen: gvproxy was ended by signal 9/g) ?? [], 3)
      })
    )
  )

  it.scopedLive("of a copy works at once, with its own address and only the forwards it is given", () =>
    run(
      Effect.gen(function* () {
        const machinen = yield* Machinen
        const [ours, theirs, host] = [yield* freePort, yield* freePort, yield* hostServer(Buffer.from("the host"))]
        const source = yield* boot({ portForward: [{ hostPort: ours, guestPort: 80 }] })
        yield* serve(source, 80, Buffer.from("the guest"))
        assert.strictEqual(String(yield* get(`http://127.0.0.1:${ours}/`)), "the guest")
        const mac = (vm: Vm) => sh(vm, "cat /sys/class/net/eth0/address")
        const fetch = (vm: Vm) => sh(vm, `wget -q -O - http://host.machinen.internal:${host}/`)

        const { siblings } = yield* machinen.fork(source, { portForward: [{ hostPort: theirs, guestPort: 80 }] })
        const bare = yield* machinen.fork(source)
        const snapDir = newBundle()
        yield* machinen.snapshot(source, { outDir: snapDir, leaveRunning: true })
        const { rejuvenation, vm: restored } = yield* machinen.restore({ snapDir })
        const copies = [...siblings, ...bare.siblings].map(({ vm }) => vm)
        assert.lengthOf(gvproxies(), 1, "a copy that says nothing is served by nobody")
        assert.include(rejuvenation.renewed, "mac")
        const vms = [source, ...copies, restored]
        const macs = yield* Effect.forEach(vms, mac)
        assert.lengthOf(new Set(macs), vms.length)
        assert.deepStrictEqual(
          yield* Effect.forEach(vms, fetch),
          vms.map(() => "the host")
        )
        assert.strictEqual(String(yield* get(`http://127.0.0.1:${theirs}/`)), "the guest")
        assert.deepStrictEqual(
          vms.map(({ entry }) => entry.portForward?.map(({ hostPort }) => hostPort)),
          [[ours], [theirs], [], []]
        )
        const several = yield* Effect.flip(
          Effect.asVoid(machinen.fork(source, { count: 2, portForward: [{ hostPort: 1, guestPort: 1 }] }))
        )
        assert.strictEqual(several.code, "BOOT_PORT_FORWARD_CONFLICT")
      })
    )
  )

  it.scopedLive("a port that is taken is refused before anything is there, and its holder named when it is a VM", () =>
    run(
      Effect.gen(function* () {
        const taken = yield* hostServer(Buffer.alloc(0))
        const forward = (hostPort: number) => ({ portForward: [{ hostPort, guestPort: 80 }] })
        const foreign = yield* Effect.flip(Effect.asVoid(boot(forward(taken))))
        assert.strictEqual(foreign.code, "BOOT_PORT_FORWARD_IN_USE")
        assert.include(foreign.message, `127.0.0.1:${taken} is taken, by `)
        assert.include(foreign.message, `(pid ${process.pid})`)
        assert.deepStrictEqual(leftovers(home), nothing)

        const port = yield* freePort
        const { vm } = yield* Effect.flatMap(Machinen, (m) => m.boot({ image: "micro", name: "web", ...forward(port) }))
        const ours = yield* Effect.flip(Effect.asVoid(boot(forward(port))))
        assert.strictEqual(ours.code, "BOOT_PORT_FORWARD_IN_USE")
        assert.include(ours.message, 'by VM "web"')
        yield* vm.stop()
        yield* boot(forward(port))

        const nowhere = yield* Effect.flip(
          Effect.asVoid(boot({ portForward: [{ hostPort: port, guestPort: 80, hostAddr: "203.0.113.9" }] }))
        )
        assert.strictEqual(nowhere.code, "BOOT_PORT_FORWARD_INVALID")
      })
    )
  )

  it.scopedLive("without a network the guest has no card; without gvproxy a VM that wants one is refused", () =>
    Effect.gen(function* () {
      const alone = Effect.flatMap(boot({ network: "none" }), (vm) => sh(vm, "ls /sys/class/net"))
      const missing = { MACHINEN_GVPROXY: path.join(home, "no-such-program") }
      const cards = yield* Effect.provide(Effect.scoped(alone), live(home, missing))
      assert.strictEqual(cards, "lo")
      const refused = yield* Effect.provide(Effect.flip(Effect.scoped(Effect.asVoid(boot()))), live(home, missing))
      assert.strictEqual(refused.code, "GVPROXY_NOT_FOUND")
      assert.include(refused.hint, "unset")
    })
  )

  it.scopedLive("goes on while the VM is paused and resumed", () =>
    run(
      Effect.gen(function* () {
        const port = yield* freePort
        const vm = yield* boot({ portForward: [{ hostPort: port, guestPort: 80 }] })
        yield* serve(vm, 80, Buffer.from("still here"))
        assert.strictEqual(String(yield* get(`http://127.0.0.1:${port}/`)), "still here")
        yield* vm.pause
        const waiting = yield* Effect.fork(get(`http://127.0.0.1:${port}/`))
        yield* vm.resume
        assert.strictEqual(String(yield* waiting), "still here")
      })
    )
  )

  it.live("the CLI's -p leads to a detached VM for as long as it lives", () =>
    Effect.gen(function* () {
      const port = yield* freePort
      const args = [
        "boot",
        "--detach",
        "--image",
        "micro",
        "--name",
        "cli",
        "-p",
        `${port}:80`,
        "--",
        "httpd",
        "-f",
        "-h",
        "/etc"
      ]
      const { code, stderr } = yield* cli(home, args)
      assert.deepStrictEqual({ code, stderr }, { code: 0, stderr: "" })
      const page = yield* eventually("the server", () => true).pipe(
        Effect.zipRight(get(`http://127.0.0.1:${port}/passwd`)),
        Effect.retry({ times: 50 })
      )
      assert.include(String(page), "root:")
      const [entry] = JSON.parse((yield* cli(home, ["ls", "--json"])).stdout)
      assert.deepStrictEqual(entry.portForward, [{ hostAddr: "127.0.0.1", hostPort: port, guestPort: 80 }])
      assert.strictEqual((yield* cli(home, ["stop", "cli"])).code, 0)
      assert.strictEqual(yield* Effect.flip(get(`http://127.0.0.1:${port}/`)), "ECONNREFUSED")
    })
  )
})
