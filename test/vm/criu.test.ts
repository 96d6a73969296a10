import { execFileSync } from "node:child_process"
import { existsSync, readdirSync } from "node:fs"
import { afterEach, assert, describe, it } from "@effect/vitest"
import { Chunk, Effect, Fiber, Option, Stream } from "effect"
import { Machinen } from "../../src/Machinen.ts"
import type { BootOptions } from "../../src/machine/BootOptions.ts"
import type { RestoreOptions } from "../../src/snapshot/restore.ts"
import type { SnapshotOptions } from "../../src/snapshot/snapshot.ts"
import type { Vm } from "../../src/vm/Vm.ts"
import * as fixtures from "../fixtures.ts"
import { cliPrints, eventuallyIn, leftovers, live, newBundle, settled, sh, temporaryHome } from "../fixtures.ts"

const home = temporaryHome()
const machine = live(home)

const boot = (options: BootOptions = {}) => fixtures.boot({ image: "debian", ...options })
const snapshot = (vm: Vm, options: Partial<SnapshotOptions> = {}) =>
  Effect.flatMap(Machinen, (m) =>
    m.snapshot(vm, { outDir: newBundle(), engine: "criu", leaveRunning: true, ...options })
  )
const restore = (snapDir: string, options: Partial<RestoreOptions> = {}) =>
  Effect.map(
    Effect.flatMap(Machinen, (m) => m.restore({ snapDir, ...options })),
    ({ vm }) => vm
  )

/** A process that waits in vfork until somebody writes to /run/held, which its child opens before it executes a program; its pid. */
const vforking = (vm: Vm) =>
  Effect.gen(function* () {
    const program = `import os
child = os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 3, "/run/held", os.O_RDONLY, 0)])
os.waitpid(child, 0); open("/root/done", "w").close()`
    const start = `mkfifo /run/held; setsid python3 -c '${program}' </dev/null >/dev/null 2>&1 & echo $!`
    const pid = (yield* sh(vm, start)).trim()
    yield* eventuallyIn(vm, `grep -q '^State:.D' /proc/${pid}/status`)
    return pid
  })

/**
 * Kinds of things a process may hold, looked at up to twenty times in a second: `python3 kinds.py KIND…` writes a line `<n> ok` or
 * `<n> <what>` to /root/KIND each time.
 */
const kinds = `
import ctypes, fcntl, mmap, os, pty, select, signal, socket, struct, subprocess, sys, threading, time, hashlib
libc = ctypes.CDLL(None, use_errno=True)
os.makedirs("/root/held", exist_ok=True)
at = lambda name: "/root/held/" + name
def moved(look):
    # whether each of the numbers changes, before long
    before = list(look()); end = time.monotonic() + 10
    while any(x == y for x, y in zip(look(), before)):
        if time.monotonic() > end: return False
        time.sleep(0.01)
    return True
def unlinked():
    f = open(at("gone"), "w+b"); data = os.urandom(2 << 20); f.write(data); f.flush(); os.unlink(at("gone"))
    def look(n):
        f.seek(0); return f.read() == data
    return look
def linked():
    # a name that is gone, of a file that has another
    f = open(at("one"), "w+"); f.write("linked"); f.flush(); os.link(at("one"), at("two")); os.unlink(at("one"))
    def look(n):
        f.seek(0); return f.read() == "linked" and os.fstat(f.fileno()).st_ino == os.stat(at("two")).st_ino
    return look
def timers():
    fd = libc.timerfd_create(1, 0)
    libc.timerfd_settime(fd, 0, struct.pack("qqqq", 0, 50000000, 0, 50000000), None)
    ep = select.epoll(); ep.register(fd, select.EPOLLIN)
    ev = libc.eventfd(3, 0)
    a, b = socket.socketpair(); a.send(b"pair"); r, w = os.pipe(); os.write(w, b"pipe")
    def look(n):
        if not ep.poll(5): return "the timer has stopped"
        os.read(fd, 8)
        return b.recv(4, socket.MSG_PEEK) == b"pair" and len(select.select([r, ev], [], [], 0)[0]) == 2
    return look
def watches():
    fd = libc.inotify_init1(0o4000)
    os.makedirs(at("dir"), exist_ok=True)
    assert libc.inotify_add_watch(fd, at("dir").encode(), 0x100) > 0
    assert libc.inotify_add_watch(fd, b"/etc", 0x100) > 0
    def look(n):
        # events that wait to be read are not kept: a look may be cut in two by the dump, the next may not
        for time in "ab":
            open(at("dir") + "/%d%s" % (n, time), "w").close(); open("/etc/seen", "w").close(); os.unlink("/etc/seen")
            if select.select([fd], [], [], 5)[0] == [fd] and len(os.read(fd, 65536)) >= 64: return True
        return False
    return look
def listens():
    s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(("127.0.0.1", 7000)); s.listen()
    s.settimeout(5)
    def look(n):
        # a connection that waits to be accepted is not kept: a look may be cut in two by the dump, the next may not
        for time in "ab":
            try:
                with socket.create_connection(("127.0.0.1", 7000), 5) as c, s.accept()[0] as p:
                    p.settimeout(5); c.send(b"x")
                    if p.recv(1) == b"x": return True
            except OSError: pass
        return False
    return look
def connected():
    s = socket.socket(); s.bind(("127.0.0.1", 7001)); s.listen()
    c = socket.create_connection(("127.0.0.1", 7001)); p, _ = s.accept()
    def look(n):
        try:
            c.sendall(b"%8d" % n); return p.recv(8) == b"%8d" % n
        except OSError as e: return type(e).__name__
    return look
def terminal():
    m, s = pty.openpty(); child = subprocess.Popen(["cat"], stdin=s, stdout=s, start_new_session=True)
    def look(n):
        os.write(m, b"hello\\n"); got = b""
        while got.count(b"hello") < 2: got += os.read(m, 100)
        return child.poll() is None
    return look
def shared():
    m = mmap.mmap(-1, 1 << 20); m[:4] = b"anon"
    f = open("/dev/shm/shared", "w+b"); f.truncate(4096); n = mmap.mmap(f.fileno(), 4096); n[:4] = b"file"
    g = os.memfd_create("held"); os.write(g, b"memfd")
    if os.fork() == 0:
        while True:
            for memory in m, n: memory[4] = (memory[4] + 1) % 256
            time.sleep(0.02)
    def look(_):
        # what the child writes is seen here
        if not moved(lambda: (m[4], n[4])): return "no longer shared"
        return m[:4] == b"anon" and n[:4] == b"file" and os.pread(g, 5, 0) == b"memfd"
    return look
def locked():
    f = open(at("lock"), "w"); fcntl.flock(f, fcntl.LOCK_EX)
    def look(n):
        g = open(f.name)
        try: fcntl.flock(g, fcntl.LOCK_EX | fcntl.LOCK_NB); return "the lock is lost"
        except BlockingIOError: return True
    return look
def stopped():
    child = subprocess.Popen(["sleep", "1000"]); os.kill(child.pid, signal.SIGSTOP)
    state = lambda: open("/proc/%d/stat" % child.pid).read().split()[2]
    return lambda n: state() == "T" or state()
def threads():
    data = os.urandom(1 << 16); want = hashlib.sha256(data).digest(); counts = [0] * 8; bad = []
    def run(i):
        while True:
            counts[i] += 1
            if hashlib.sha256(data).digest() != want: bad.append(i)
            time.sleep(0.02)
    for i in range(8): threading.Thread(target=run, args=(i,), daemon=True).start()
    return lambda n: "a sum came out wrong" if bad else moved(lambda: counts) or "a thread stands still"
def signals():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    fd = libc.signalfd(-1, struct.pack("Q", 1 << (signal.SIGUSR1 - 1)), 0)
    os.kill(os.getpid(), signal.SIGUSR1)
    return lambda n: select.select([fd], [], [], 0)[0] == [fd]
held = []
for kind in sys.argv[1:]:
    held.append((globals()[kind](), open("/root/" + kind, "a", buffering=1)))
n = 0
while True:
    n += 1
    for look, out in held:
        found = look(n)
        print(n, "ok" if found is True else found, file=out)
    time.sleep(0.05)
`
const all = [
  "unlinked",
  "linked",
  "timers",
  "watches",
  "listens",
  "connected",
  "terminal",
  "shared",
  "locked",
  "stopped",
  // before there are threads: they have its mask from their start
  "signals",
  "threads"
] as const

/** Commands of clients that stay, one for each group of kinds, all looked at once. */
const holding = (vm: Vm, ...groups: ReadonlyArray<ReadonlyArray<string>>) =>
  Effect.gen(function* () {
    yield* vm.writeFile("/root/kinds.py", kinds)
    yield* Effect.forEach(groups, (wanted) =>
      Effect.gen(function* () {
        const running = yield* vm.start({ argv: ["python3", "/root/kinds.py", ...wanted] })
        const said = yield* Effect.forkScoped(Stream.runCollect(running.output))
        yield* eventuallyIn(vm, wanted.map((kind) => `test -s /root/${kind}`).join(" && ")).pipe(
          Effect.orElse(() =>
            Effect.flatMap(Fiber.join(said), (output) =>
              Effect.dieMessage(
                Chunk.toReadonlyArray(output)
                  .map(({ bytes }) => Buffer.from(bytes))
                  .join("")
              )
            )
          )
        )
      })
    )
  })

/** Looks what each kind sees from now on; `ok` where it goes on seeing what it should. One process: starting one takes long in a busy guest. */
const seen = (vm: Vm, wanted: ReadonlyArray<string>) =>
  Effect.map(
    vm.exec({ argv: ["python3", "-c", looking, ...wanted] }),
    ({ stdout }): Record<string, string> => JSON.parse(Buffer.from(stdout).toString())
  )
const looking = `
import json, sys, time
lines = lambda kind: open("/root/" + kind).read().splitlines()
before = {kind: len(lines(kind)) for kind in sys.argv[1:]}
answers = {}
end = time.monotonic() + 60
for kind in before:
    while len(lines(kind)) < before[kind] + 3 and time.monotonic() < end: time.sleep(0.1)
    answers[kind] = " ".join(sorted({line.split(" ", 1)[1] for line in lines(kind)[before[kind]:]})) or "stands still"
print(json.dumps(answers))
`
const fine = (wanted: ReadonlyArray<string>) => Object.fromEntries(wanted.map((kind) => [kind, "ok"]))

/** What a source must still be able to after a snapshot that was refused. */
const goesOn = (vm: Vm) =>
  Effect.gen(function* () {
    assert.strictEqual(
      yield* sh(vm, "cat /sys/fs/cgroup/workload/cgroup.freeze; echo on > /root/on; cat /root/on"),
      "0\non"
    )
    yield* eventuallyIn(vm, "test ! -e /var/lib/machinen/dump")
  })

describe("the engine criu", { timeout: 240_000 }, () => {
  afterEach(() => settled(home))

  it.scopedLive("brings back every kind of thing a process may hold, in each sibling and in the source", () =>
    Effect.gen(function* () {
      const source = yield* boot({ memoryMib: 1024, vcpus: 2 })
      yield* holding(source, all.slice(0, 6), all.slice(6))
      assert.deepStrictEqual(yield* seen(source, all), fine(all))
      const { siblings } = yield* (yield* Machinen).fork(source, { engine: "criu", count: 2, tcpKeep: true })
      for (const { vm } of siblings) {
        assert.deepStrictEqual(yield* seen(vm, all), fine(all))
        // nothing of the dump stays
        yield* eventuallyIn(vm, "test ! -e /var/lib/machinen/dump")
      }
      assert.deepStrictEqual(yield* seen(source, all), fine(all))
      assert.strictEqual(yield* sh(source, "ls /root/held | grep link_remap || true"), "")
    }).pipe(Effect.provide(machine))
  )

  it.scopedLive("closes established connections where they are not to be kept, and keeps the source's", () =>
    Effect.gen(function* () {
      const source = yield* boot()
      yield* holding(source, ["connected", "listens"])
      const { bundle } = yield* snapshot(source, { tcpClose: true })
      const copy = yield* restore(bundle.dir)
      const { connected, listens } = yield* seen(copy, ["connected", "listens"])
      assert.strictEqual(listens, "ok")
      assert.match(connected ?? "", /^(BrokenPipeError|ConnectionResetError|False)/)
      assert.deepStrictEqual(yield* seen(source, ["connected"]), fine(["connected"]))
    }).pipe(Effect.provide(machine))
  )

  it.scopedLive("reads memory when it is touched, if asked to, until all of it is there", () =>
    Effect.gen(function* () {
      const source = yield* boot({ memoryMib: 1024 })
      yield* source.writeFile(
        "/root/heap.py",
        "import os,time,zlib\nheap=os.urandom(1<<20)*200;open('/root/sum','w').write(str(zlib.crc32(heap)))\n" +
          "while not os.path.exists('/root/go'): time.sleep(0.01)\n" +
          "open('/root/now','w').write(str(zlib.crc32(heap)))\ntime.sleep(1000)\n"
      )
      yield* Effect.forkScoped(source.execRaw({ argv: ["python3", "/root/heap.py"] }))
      yield* eventuallyIn(source, "test -s /root/sum")
      const { bundle } = yield* snapshot(source, { leaveRunning: false })
      const lazy = yield* restore(bundle.dir, { lazy: true })
      const { lazyPagesPending } = yield* lazy.stats
      assert.isAbove(lazyPagesPending, 1000)
      assert.strictEqual((yield* lazy.memoryStats).lazyPagesPending <= lazyPagesPending, true)
      yield* sh(lazy, "touch /root/go")
      yield* eventuallyIn(lazy, "test -s /root/now")
      assert.strictEqual(yield* sh(lazy, "cmp /root/sum /root/now && echo same"), "same")
      // a dump waits until everything is there
      const { bundle: second } = yield* snapshot(lazy)
      assert.strictEqual((yield* lazy.stats).lazyPagesPending, 0)
      const eager = yield* restore(second.dir)
      assert.strictEqual((yield* eager.stats).lazyPagesPending, 0)
      assert.strictEqual(yield* sh(eager, "pgrep -c python3"), "1")
    }).pipe(Effect.provide(machine))
  )

  it.scopedLive("a main command goes on with its input open and its output in the log", () =>
    Effect.gen(function* () {
      const source = yield* boot({
        command: ["sh", "-c", "while [ ! -e /go ]; do sleep 0.05; done; echo out; echo err >&2; cat; exit $?"],
        env: { KEPT: "kept" },
        cwd: "/srv"
      })
      yield* source.startMain(Stream.never)
      const { bundle } = yield* snapshot(source)
      const copy = yield* restore(bundle.dir, { env: { ADDED: "added" } })
      assert.strictEqual(yield* sh(copy, "pwd; echo $KEPT $ADDED; touch /go"), "/srv\nkept added")
      const log = yield* copy.logs("output", { follow: true }).pipe(
        Stream.decodeText(),
        Stream.scan("", (before, more) => before + more),
        Stream.takeUntil((said) => said.includes("out\n") && said.includes("err\n")),
        Stream.runLast
      )
      assert.match(Option.getOrThrow(log), /^(out\nerr|err\nout)\n$/)
      // it still reads: nothing but the signal ends it
      yield* eventuallyIn(copy, "pgrep -x cat")
      yield* Effect.ignore(copy.execRaw("pkill -x cat")) // the machine ends while it is asked to
      const exit = yield* copy.wait
      assert.deepStrictEqual([exit.main?.code, exit.orderly], [143, true])
      assert.strictEqual(yield* sh(source, "test ! -e /go && echo waits"), "waits")
    }).pipe(Effect.provide(machine))
  )

  it.scopedLive("one engine's copy can be taken by the other", () =>
    Effect.gen(function* () {
      const wanted = ["timers", "unlinked", "threads"]
      let vm = yield* boot()
      yield* holding(vm, wanted)
      for (const engine of ["criu", "vmstate", "criu", "criu", "vmstate"] as const) {
        const { bundle } = yield* snapshot(vm, { engine, leaveRunning: false })
        assert.strictEqual(bundle.manifest.engine, engine)
        vm = yield* restore(bundle.dir)
        assert.deepStrictEqual(yield* seen(vm, wanted), fine(wanted), engine)
      }
    }).pipe(Effect.provide(machine))
  )

  it.scopedLive("uses another range of pids, so that those of a dump are free", () =>
    Effect.gen(function* () {
      const source = yield* boot()
      assert.isAbove(Number(yield* sh(source, "echo $$")), 1000)
      yield* Effect.forkScoped(source.execRaw("sleep 1000"))
      yield* eventuallyIn(source, "pgrep sleep")
      const before = yield* sh(source, "pgrep sleep")
      const copy = yield* restore((yield* snapshot(source)).bundle.dir)
      assert.strictEqual(yield* sh(copy, "pgrep sleep"), before)
      assert.isAbove(Number(yield* sh(copy, "echo $$")), 1000)
    }).pipe(Effect.provide(machine))
  )

  it.scopedLive("waits for the end of a vfork, during which CRIU cannot stop the process", () =>
    Effect.gen(function* () {
      const vm = yield* boot()
      yield* vforking(vm)
      yield* sh(
        vm,
        "setsid sh -c 'until [ -e /var/lib/machinen/dump ]; do sleep 0.05; done; sleep 1; : > /run/held' </dev/null >/dev/null 2>&1 &"
      )
      const { bundle } = yield* snapshot(vm)
      yield* eventuallyIn(vm, "[ -e /root/done ]")
      const copy = yield* restore(bundle.dir)
      yield* eventuallyIn(copy, "[ -e /root/done ]")
    }).pipe(Effect.provide(machine))
  )

  it.scopedLive("what a dump has taken on the disk is given back", () =>
    Effect.gen(function* () {
      const vm = yield* boot()
      yield* Effect.forkScoped(
        vm.execRaw({
          argv: ["python3", "-c", "import os,time\nx=os.urandom(1<<20)*40\nopen('/root/up','w')\ntime.sleep(1000)"]
        })
      )
      yield* eventuallyIn(vm, "test -e /root/up")
      const sizes = yield* Effect.forEach([1, 2, 3], () =>
        Effect.map(snapshot(vm), ({ bundle }) => bundle.manifest.blobs.reduce((sum, blob) => sum + blob.dataBytes, 0))
      )
      const [first = 0] = sizes
      assert.isAbove(first, 40 * 2 ** 20)
      assert.isBelow(Math.max(...sizes), first + 20 * 2 ** 20)
    }).pipe(Effect.provide(machine))
  )

  it.scopedLive("a bundle is the same after five restores, which have identities of their own", () =>
    Effect.gen(function* () {
      const source = yield* boot()
      yield* sh(source, "echo 0123456789abcdef0123456789abcdef > /etc/machine-id")
      const { bundle } = yield* snapshot(source, { leaveRunning: false })
      const hashes = () =>
        execFileSync("sha256sum", readdirSync(bundle.dir).sort(), { cwd: bundle.dir, encoding: "utf8" })
      const before = hashes()
      const copies = yield* Effect.forEach([1, 2, 3, 4, 5], () => restore(bundle.dir), { concurrency: 2 })
      const identities = yield* Effect.forEach(copies, (vm) =>
        sh(
          vm,
          "dd if=/dev/zero of=/fill bs=1M count=100 2>/dev/null; rm /fill; hostname; cat /etc/machine-id /run/machinen/generation /proc/sys/kernel/random/uuid"
        )
      )
      for (const line of [0, 1, 2, 3]) {
        assert.strictEqual(new Set(identities.map((identity) => identity.split("\n")[line])).size, 5, `line ${line}`)
      }
      assert.strictEqual(hashes(), before)
      assert.deepStrictEqual(yield* (yield* Machinen).verify(bundle.dir), [])
    }).pipe(Effect.provide(machine))
  )

  describe("is refused, and the source goes on:", () => {
    const refusal = (vm: Vm, options: Partial<SnapshotOptions> = {}) =>
      Effect.gen(function* () {
        const outDir = newBundle()
        const error = yield* Effect.flip(Effect.asVoid(snapshot(vm, { ...options, outDir })))
        assert.isFalse(existsSync(outDir))
        assert.isNotEmpty(error.hint ?? "")
        return error
      })

    it.scopedLive("an image without criu", () =>
      Effect.gen(function* () {
        const vm = yield* boot({ image: "micro" })
        const { code, hint, message } = yield* refusal(vm)
        assert.strictEqual(code, "SNAPSHOT_DUMP_FAILED")
        assert.match(message, /the image has no criu/)
        assert.match(hint ?? "", /debian.*vmstate/)
        yield* goesOn(vm)
      }).pipe(Effect.provide(machine))
    )

    it.scopedLive("io_uring, with the name of the process that uses it", () =>
      Effect.gen(function* () {
        const vm = yield* boot()
        const uring =
          "import ctypes,time;b=ctypes.create_string_buffer(120);print(ctypes.CDLL(None).syscall(425,4,b),flush=True);time.sleep(1000)"
        const running = yield* vm.start({ argv: ["python3", "-c", uring] })
        const first = yield* Stream.runHead(running.output)
        assert.match(first._tag === "Some" ? Buffer.from(first.value.bytes).toString() : "", /^[0-9]+\n$/)
        const { code, message } = yield* refusal(vm)
        assert.strictEqual(code, "SNAPSHOT_DUMP_FAILED")
        assert.match(message, /process [0-9]+ \(python3\) uses io_uring/)
        yield* goesOn(vm)
        assert.strictEqual(yield* sh(vm, `kill -0 ${running.pid} && echo alive`), "alive")
      }).pipe(Effect.provide(machine))
    )

    it.scopedLive("a pipe between processes that have no parent in common", () =>
      Effect.gen(function* () {
        const vm = yield* boot()
        yield* sh(vm, "(sleep 1000 | sleep 1001) </dev/null >/dev/null 2>&1 & sleep 0.2; kill -9 $!")
        const { message } = yield* refusal(vm)
        assert.match(message, /processes [0-9]+ and [0-9]+ share a pipe/)
        yield* goesOn(vm)
        assert.strictEqual(yield* sh(vm, "pgrep -c sleep"), "2")
      }).pipe(Effect.provide(machine))
    )

    it.scopedLive("with CRIU's own words: a socket between processes that have no parent in common", () =>
      Effect.gen(function* () {
        const vm = yield* boot()
        const apart =
          "import os,socket,time\na,b=socket.socketpair()\nif os.fork()==0:\n os.setsid()\n if os.fork()==0:\n  a.close(); time.sleep(1000)\n os._exit(0)\nos.wait(); b.close(); print('ready',flush=True); time.sleep(1000)"
        const running = yield* vm.start({ argv: ["python3", "-c", apart] })
        yield* Stream.runHead(running.output)
        const { message } = yield* refusal(vm)
        assert.match(message, /criu dump: Error \(criu\/sk-unix.c:[0-9]+\): unix: External socket/)
        yield* goesOn(vm)
      }).pipe(Effect.provide(machine))
    )

    it.scopedLive("a vfork whose child never executes a program, with the pid of the process that waits for it", () =>
      Effect.gen(function* () {
        const vm = yield* boot()
        const pid = yield* vforking(vm)
        const failure = yield* refusal(vm, { timeoutMs: 3000 })
        assert.strictEqual(failure.code, "SNAPSHOT_DUMP_FAILED")
        assert.include(failure.message, `process ${pid} waits in vfork`)
        yield* sh(vm, ": > /run/held") // the child goes on, and so does its parent
        yield* eventuallyIn(vm, "[ -e /root/done ]")
      }).pipe(Effect.provide(machine))
    )

    it.scopedLive("a time limit that is too short", () =>
      Effect.gen(function* () {
        const vm = yield* boot()
        yield* holding(vm, ["timers", "unlinked"])
        const { code } = yield* refusal(vm, { timeoutMs: 20 })
        assert.strictEqual(code, "SNAPSHOT_TIMEOUT")
        yield* goesOn(vm)
        assert.deepStrictEqual(yield* seen(vm, ["timers", "unlinked"]), fine(["timers", "unlinked"]))
        const copy = yield* restore((yield* snapshot(vm)).bundle.dir)
        assert.deepStrictEqual(yield* seen(copy, ["timers", "unlinked"]), fine(["timers", "unlinked"]))
      }).pipe(Effect.provide(machine))
    )

    it.scopedLive("a guest's disk without room for the images", () =>
      Effect.gen(function* () {
        const vm = yield* boot({ memoryMib: 1024 })
        yield* Effect.forkScoped(
          vm.execRaw({
            argv: ["python3", "-c", "import os,time\nx=os.urandom(200<<20)\nopen('/root/filled','w')\ntime.sleep(1000)"]
          })
        )
        yield* eventuallyIn(vm, "test -e /root/filled")
        yield* sh(vm, "free=$(df -m / | awk 'NR==2{print $4}'); fallocate -l $((free - 100))M /ballast")
        const { code } = yield* refusal(vm)
        assert.strictEqual(code, "SNAPSHOT_DUMP_FAILED")
        yield* sh(vm, "rm /ballast")
        yield* goesOn(vm)
        assert.strictEqual(yield* sh(vm, "pgrep -c python3"), "1")
      }).pipe(Effect.provide(machine))
    )
  })

  it.live("the CLI takes, shows, restores and forks", () =>
    Effect.gen(function* () {
      const run = (...args: ReadonlyArray<string>) => cliPrints(home, ...args)
      yield* run("boot", "--image", "debian", "--name", "cli", "--detach")
      const dir = newBundle()
      const taken = JSON.parse(
        yield* run("snapshot", "cli", dir, "--engine", "criu", "--keep-alive", "--tcp-close", "--json")
      )
      assert.deepStrictEqual(
        [taken.engine, taken.blobs.map(({ name }: { name: string }) => name)],
        ["criu", ["upper.img"]]
      )
      assert.isAbove(taken.phasesMs.hold, 0)
      assert.strictEqual(JSON.parse(yield* run("snapshot", "inspect", dir, "--json")).restorable, true)
      yield* run("restore", dir, "--name", "again", "--lazy", "--detach")
      const { siblings } = JSON.parse(yield* run("fork", "cli", "--engine", "criu", "--tcp-keep", "--detach", "--json"))
      assert.strictEqual(yield* run("exec", siblings[0].name, "--", "echo", "on"), "on")
      assert.strictEqual(yield* run("exec", "again", "--", "echo", "on"), "on")
      for (const name of ["cli", "again", siblings[0].name]) yield* run("stop", name)
      assert.deepStrictEqual(leftovers(home).names, [])
    })
  )
})
