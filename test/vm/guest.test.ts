import * as path from "node:path"
import { afterAll, assert, describe, it, layer } from "@effect/vitest"
import { Effect, Fiber, type Scope, Stream } from "effect"
import type { CommandSpec } from "../../src/guest/Exec.ts"
import { Machinen } from "../../src/Machinen.ts"
import type { BootOptions } from "../../src/machine/BootOptions.ts"
import {
  busyboxExt4,
  cli,
  eventually,
  Guest,
  guest,
  inTime,
  live,
  settled,
  sh,
  startCli,
  temporaryDirectory,
  temporaryHome,
  text
} from "../fixtures.ts"

const home = temporaryHome()
afterAll(() => settled(home))
const run = <A, E>(program: Effect.Effect<A, E, Machinen | Scope.Scope>) => Effect.provide(program, live(home))
const boot = (options: BootOptions) =>
  Effect.map(
    Effect.flatMap(Machinen, (m) => m.boot(options)),
    ({ vm }) => vm
  )

/** More input than a command that reads nothing lets through. */
const unread = 3 * 2 ** 20

describe("the machine's name", () => {
  const names = "cat /etc/hostname; hostname -f; grep -c . /etc/hosts; grep -w $(hostname) /etc/hosts"

  for (const image of ["micro", "debian"]) {
    it.scopedLive(`is in the files of ${image}, and in those of a copy`, () =>
      run(
        Effect.gen(function* () {
          const vm = yield* boot({ image, name: `named-${image}` })
          const [hostname, full, lines, entry] = (yield* sh(vm, names)).split("\n")
          assert.deepStrictEqual([hostname, full], [`named-${image}`, `named-${image}`])
          assert.strictEqual(entry, `127.0.1.1\tnamed-${image}`)
          assert.include(yield* sh(vm, "ping -c 1 localhost 2>/dev/null || getent hosts localhost"), "localhost")
          const machinen = yield* Machinen
          const copy = (yield* machinen.fork(vm, { count: 1 })).siblings[0]?.vm
          assert.isDefined(copy)
          const own = yield* sh(copy, "hostname")
          assert.notStrictEqual(own, hostname)
          assert.deepStrictEqual((yield* sh(copy, names)).split("\n"), [own, own, lines, `127.0.1.1\t${own}`])
        })
      )
    )
  }

  it.scopedLive("is written to a disk of the caller's only where there is nothing", () =>
    run(
      Effect.gen(function* () {
        const dir = temporaryDirectory()
        const disk = busyboxExt4(dir, "named")
        const first = yield* boot({ rootDisk: disk, name: "first" })
        assert.strictEqual(yield* sh(first, "cat /etc/hostname"), "first")
        yield* sh(first, "echo mine >/etc/hostname; echo '10.0.0.1 mine' >/etc/hosts; sync")
        yield* first.stop()
        const second = yield* boot({ rootDisk: disk, name: "second" })
        assert.strictEqual(yield* sh(second, "cat /etc/hostname /etc/hosts"), "mine\n10.0.0.1 mine")
      })
    )
  )
})

/** Prints for ever, in another control group than that of the commands. */
const inGroup = (made: string, group: string) =>
  `${made}; echo $$ >/sys/fs/cgroup/${group}/cgroup.procs; while :; do echo beat; sleep 0.02; done`
/** One beside: where container engines put their containers. */
const contained = inGroup("mkdir /sys/fs/cgroup/engine /sys/fs/cgroup/engine/one", "engine/one")
/** The root group, which itself can neither be frozen nor killed: where a process goes to leave one that is to be removed. */
const uncontained = inGroup("true", "")

describe("a control group of a command's own choice", () => {
  for (const [what, command] of [
    ["a container's", contained],
    ["the root group", uncontained]
  ] as const) {
    it.scopedLive(`${what}: stands still with the commands while the machine is copied`, () =>
      run(
        Effect.gen(function* () {
          const vm = yield* boot({ image: "micro" })
          const { output } = yield* vm.start({ argv: ["sh", "-c", command] })
          const beats = yield* Stream.toPull(Stream.rechunk(output, 1))
          yield* beats
          if (command === contained) assert.isAtLeast((yield* vm.stats).processes, 1)
          yield* Effect.scoped(
            Effect.gen(function* () {
              yield* vm.freeze({ sync: false, lazyUmount: false, timeout: "5 seconds" })
              // What was printed before is still to come; after it there is nothing.
              const silent = Effect.timeoutFail(beats, { duration: "500 millis", onTimeout: () => "silent" as const })
              const still = yield* Effect.forever(silent).pipe(Effect.timeout("5 seconds"), Effect.flip)
              assert.strictEqual(still, "silent")
            })
          )
          yield* beats
        })
      )
    )
  }

  it.scopedLive("a container's: is not left out of what criu saves: it cannot save it, and says so", () =>
    run(
      Effect.gen(function* () {
        const vm = yield* boot({ image: "debian" })
        const { output } = yield* vm.start({ argv: ["sh", "-c", contained] })
        yield* Stream.runHead(output)
        const machinen = yield* Machinen
        const outDir = path.join(temporaryDirectory(), "bundle")
        const error = yield* Effect.flip(machinen.snapshot(vm, { outDir, engine: "criu", leaveRunning: true }))
        assert.match(error.message, /is in the control group \/engine\/one, which CRIU does not freeze/)
      })
    )
  )
})

describe("the end from within", () => {
  for (const command of ["poweroff -f", "halt -f", "reboot -f"]) {
    it.scopedLive(`${command} ends the VM and the commands that are waited for`, () =>
      run(
        Effect.gen(function* () {
          const vm = yield* boot({ image: "micro" })
          const waiting = yield* Effect.fork(Effect.flip(vm.execRaw({ argv: ["sleep", "600"] })))
          const errors = [yield* Effect.flip(vm.execRaw({ argv: ["sh", "-c", command] })), yield* Fiber.join(waiting)]
          for (const { code, message } of errors) {
            assert.deepStrictEqual(
              [code, message],
              ["EXEC_VM_ENDED", "the guest powered itself off during the operation"]
            )
          }
          const { orderly, reason, vmm } = yield* vm.wait
          assert.deepStrictEqual(
            { orderly, reason, vmm },
            { orderly: false, reason: "guest", vmm: { code: 0, signal: null } }
          )
        })
      )
    )
  }

  const failures: ReadonlyArray<readonly [command: string, message: RegExp]> = [
    ["echo c >/proc/sysrq-trigger", /^the guest failed: Kernel panic - not syncing: .* during the operation$/],
    ["kill -9 -1; sleep 600", /^the guest failed: machinen-init: agent: killed by signal 9 during the operation$/]
  ]
  for (const [command, message] of failures) {
    it.scopedLive(`${command} is reported as a failure to callers that wait for a command`, () =>
      run(
        Effect.gen(function* () {
          const vm = yield* boot({ image: "micro" })
          const error = yield* Effect.flip(vm.execRaw({ argv: ["sh", "-c", command] }))
          assert.strictEqual(error.code, "EXEC_VM_FAILED")
          assert.match(error.message, message)
          assert.strictEqual((yield* vm.wait).reason, "vmm")
        })
      )
    )
  }

  it.scopedLive("ends `run`, and `exec` of another program, as a kill does", () =>
    run(
      Effect.gen(function* () {
        const main = yield* cli(home, ["run", "--image", "micro", "--", "poweroff", "-f"])
        assert.strictEqual(main.code, 137)
        assert.match(main.stderr, /^machinen: \(EXEC_VM_ENDED\): the guest powered itself off during the operation\n/)

        const vm = yield* boot({ image: "micro", name: "ended" })
        const waiting = yield* startCli(home, ["exec", "ended", "--", "sh", "-c", "echo up; exec sleep 600"])
        yield* inTime(home, waiting, waiting.printed("up"))
        yield* vm.kill
        const { code, stderr } = yield* inTime(home, waiting, waiting.result)
        assert.strictEqual(code, 137)
        // the shim may have ended before the other program could ask it
        assert.match(stderr, /\(EXEC_VM_ENDED\): the VM (was stopped by force|ended) during the operation\n/)
      })
    )
  )

  it.scopedLive("is reported to a program that asks when the shim has already ended", () =>
    run(
      Effect.gen(function* () {
        const vm = yield* boot({ image: "micro" })
        const attached = yield* Effect.flatMap(Machinen, (machinen) => machinen.attach(vm.id))
        assert.strictEqual((yield* vm.kill).reason, "kill")
        assert.strictEqual((yield* attached.wait).reason, "unseen")
      })
    )
  )
})

layer(guest(home, { image: "debian" }), { excludeTestServices: true, timeout: 60_000 })("the kernel", (it) => {
  it.effect("joins containers by a bridge, and translates their addresses", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      yield* sh(
        vm,
        `set -e
        ip link add br0 type bridge
        ip addr add 172.30.0.1/24 dev br0
        ip link set br0 up
        for n in 2 3; do
          ip netns add c$n
          ip link add v$n type veth peer name eth0 netns c$n
          ip link set v$n master br0 up
          ip -n c$n addr add 172.30.0.$n/24 dev eth0
          ip -n c$n link set eth0 up
          ip -n c$n route add default via 172.30.0.1
        done
        echo 1 >/proc/sys/net/ipv4/ip_forward
        iptables -t nat -A POSTROUTING -s 172.30.0.0/24 ! -o br0 -j MASQUERADE
        iptables -t nat -A PREROUTING -p tcp -m addrtype --dst-type LOCAL --dport 8080 -j DNAT --to 172.30.0.2:80
        iptables -A FORWARD -o br0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
        iptables -A FORWARD -p tcp --dport 80 -m comment --comment published -j ACCEPT
        mkdir /srv/page; echo "a container's page" >/srv/page/index.html
        ip netns exec c2 setsid python3 -m http.server --directory /srv/page 80 >/dev/null 2>&1 &`
      )
      const fetch = (url: string) =>
        `python3 -c 'import urllib.request as r; print(r.urlopen("${url}", timeout=5).read().decode(), end="")'`
      const served = `until ip netns exec c3 ${fetch("http://172.30.0.2/")} 2>/dev/null; do :; done`
      assert.strictEqual(yield* sh(vm, served), "a container's page")
      // By a published port, as from outside.
      assert.strictEqual(yield* sh(vm, `ip netns exec c3 ${fetch("http://172.30.0.1:8080/")}`), "a container's page")
      // Out of the machine: the gateway answers to the machine's own address only.
      const lookUp = `import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)
q = b"\\x12\\x34\\x01\\0\\0\\x01\\0\\0\\0\\0\\0\\0\\x07gateway\\x08machinen\\x08internal\\0\\0\\x01\\0\\x01"
s.sendto(q, ("192.168.127.1", 53)); print(s.recv(512)[:2].hex())`
      assert.strictEqual(yield* sh(vm, `ip netns exec c3 python3 -c '${lookUp}'`), "1234")
    })
  )

  it.effect("runs i386 programs", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      yield* vm.writeFile("/tmp/i386", i386Program, { mode: 0o755 })
      assert.strictEqual((yield* vm.execRaw({ argv: ["/tmp/i386"] })).exitCode, 42)
    })
  )

  it.effect("says why a program is not run", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      const arm = Buffer.from(i386Program)
      arm.writeUInt16LE(183, 18)
      yield* vm.writeFile("/tmp/arm", arm, { mode: 0o755 })
      yield* vm.writeFile("/tmp/lost", "#!/opt/no-such-interpreter -x\n", { mode: 0o755 })
      yield* vm.writeFile("/tmp/text", "echo hi\n", { mode: 0o755 })
      yield* sh(vm, "mkdir -m 700 /srv/private")
      const refusal = (command: CommandSpec) => Effect.flip(vm.execRaw(command))
      const arm64 = yield* refusal({ argv: ["/tmp/arm"] })
      assert.deepStrictEqual([arm64.code, arm64.message.includes("arm64")], ["EXEC_NOT_EXECUTABLE", true])
      const lost = yield* refusal({ argv: ["/tmp/lost"] })
      assert.strictEqual(lost.code, "EXEC_NOT_EXECUTABLE")
      assert.include(lost.message, "/opt/no-such-interpreter")
      const plain = yield* refusal({ argv: ["/tmp/text"] })
      assert.deepStrictEqual([plain.code, plain.message.includes("#!")], ["EXEC_NOT_EXECUTABLE", true])
      const shut = yield* refusal({ argv: ["true"], cwd: "/srv/private", user: "nobody" })
      assert.strictEqual(shut.code, "EXEC_CWD_INVALID")
      assert.include(shut.message, "/srv/private")
    })
  )

  it.effect("has a pager, and a locale in which an é is one letter", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      assert.strictEqual(yield* sh(vm, "echo é | less -F; echo $LANG"), "é\nC.UTF-8")
      const { stdout } = yield* vm.execRaw({ argv: ["sh", "-c", "echo $LANG"], env: { LANG: "C" } })
      assert.strictEqual(text(stdout).trimEnd(), "C")
    })
  )
})

layer(guest(home, { image: "micro", name: "deaf" }), { excludeTestServices: true, timeout: 60_000 })(
  "a command that does not read",
  (it) => {
    it.scoped("hears signals sent behind its input", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const piece = new Uint8Array(64 * 1024)
        let sent = 0
        const stdin = Stream.repeatEffect(Effect.sync(() => piece)).pipe(
          Stream.take(unread / piece.length),
          Stream.tap(() => Effect.sync(() => (sent += piece.length)))
        )
        const command = yield* vm.start({ argv: ["sleep", "888"], stdin })
        let [last, same] = [0, 0]
        yield* eventually("the input stands still", () => {
          same = sent === last && sent > 0 ? same + 1 : 0
          last = sent
          return same === 40
        })
        yield* command.signal(15)
        yield* Stream.runDrain(command.output)
        assert.strictEqual((yield* command.exit).signal, 15)
        assert.isBelow(sent, unread)
      })
    )

    it.scoped("reads all of its input, however much, and in order", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const bytes = Buffer.alloc(5 * 2 ** 20, "0123456789abcdef\n")
        const { stdout } = yield* vm.execRaw({ argv: ["cat"], stdin: Stream.make(bytes) })
        assert.isTrue(Buffer.from(stdout).equals(bytes))
      })
    )

    it.scoped("ends with a client that is killed", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const script = "head -c 65536 >/dev/null; echo read by $$.; exec sleep 777"
        const client = yield* startCli(home, ["exec", "-i", "deaf", "--", "sh", "-c", script], {
          stdin: new Uint8Array(unread)
        })
        yield* client.printed(".")
        const pid = /read by (\d+)\./.exec(client.sofar())?.[1]
        assert.isDefined(pid)
        yield* client.kill("SIGKILL")
        yield* sh(vm, `while [ -d /proc/${pid} ]; do usleep 10000; done`)
      })
    )

    it.scoped("loses its session to a client that takes it, and its own client hears of it once it reads", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const size = { columns: 80, rows: 24 }
        const stalled = yield* vm.terminal({ argv: ["yes", "a rather long line"] }, { ...size, session: "flood" })
        let busy = 0
        // Its output fills every buffer up to the host: then it stands still.
        const standsStill = sh(vm, `cat /proc/${stalled.pid}/stat | cut -d' ' -f14,15`)
        let before = yield* standsStill
        while (busy < 3) {
          const now = yield* standsStill
          busy = now === before ? busy + 1 : 0
          before = now
        }
        const thief = yield* vm.terminal({ argv: [] }, { ...size, session: "flood", steal: true })
        const seen = yield* thief.output.pipe(
          Stream.scan(0, (total, bytes) => total + bytes.length),
          Stream.takeUntil((total) => total > 2 ** 20),
          Stream.runLast
        )
        assert.isTrue(seen._tag === "Some" && seen.value > 2 ** 20)
        // The old client types into nothing, and is told why once it reads.
        const error = yield* Effect.flip(Stream.runDrain(stalled.output))
        assert.strictEqual(error.code, "EXEC_SESSION_IN_USE")
        yield* vm.killSession("flood")
      })
    )
  }
)

/** `_exit(42)` by `int 0x80`: an ELF header, one segment, twelve bytes of code. */
const i386Program = (() => {
  const code = Buffer.from([0xb8, 1, 0, 0, 0, 0xbb, 42, 0, 0, 0, 0xcd, 0x80])
  const elf = Buffer.alloc(84 + code.length)
  Buffer.from([0x7f, 0x45, 0x4c, 0x46, 1, 1, 1]).copy(elf)
  elf.writeUInt16LE(2, 16)
  elf.writeUInt16LE(3, 18)
  elf.writeUInt32LE(1, 20)
  elf.writeUInt32LE(0x08048054, 24)
  elf.writeUInt32LE(52, 28)
  elf.writeUInt16LE(52, 40)
  elf.writeUInt16LE(32, 42)
  elf.writeUInt16LE(1, 44)
  const segment = [1, 0, 0x08048000, 0x08048000, elf.length, elf.length, 5, 4096]
  for (const [i, value] of segment.entries()) elf.writeUInt32LE(value, 52 + 4 * i)
  code.copy(elf, 84)
  return elf
})()
