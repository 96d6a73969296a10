import { execFileSync, spawn, spawnSync } from "node:child_process"
import {
  appendFileSync,
  chmodSync,
  chownSync,
  copyFileSync,
  existsSync,
  linkSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  truncateSync,
  utimesSync,
  writeFileSync
} from "node:fs"
import * as path from "node:path"
import { afterAll, afterEach, assert, describe, it, layer } from "@effect/vitest"
import { Effect } from "effect"
import { Machinen } from "../../src/Machinen.ts"
import type { Vm } from "../../src/vm/Vm.ts"
import {
  boot,
  cli,
  environment,
  eventually,
  Guest,
  guest,
  live,
  settled,
  sh,
  temporaryDirectory,
  temporaryHome,
  text,
  vmEntry
} from "../fixtures.ts"
import { hostProcesses } from "../host.ts"

/** Live mounts: where they can be, and what their files are like. What holds them apart from the host is in mounts.test.ts. */
const home = temporaryHome()

/** Runs a Python program in the guest, which must end well, and returns what it prints. */
const python = (vm: Vm, program: string, ...args: ReadonlyArray<string>) =>
  Effect.map(vm.execRaw({ argv: ["python3", "-c", program, ...args] }), ({ exitCode, stderr, stdout }) => {
    assert.deepStrictEqual({ exitCode, stderr: text(stderr) }, { exitCode: 0, stderr: "" })
    return text(stdout).trimEnd()
  })

/** The servers of shared files of one VM. */
const servers = (id: string) =>
  hostProcesses().filter(
    ({ argv, environment }) =>
      argv[0]?.endsWith("/machinen-share") === true &&
      environment.some((variable) => variable === `MACHINEN_VM_DIR=${path.join(home, "vms", id)}`)
  )

describe.sequential("live mounts", () => {
  afterEach(() => settled(home))

  it.scoped("are anywhere, of directories and files, in each other, over what is there, and more than five", () =>
    Effect.gen(function* () {
      const dir = temporaryDirectory()
      const at = (name: string) => path.join(dir, name)
      for (const name of [
        "project",
        "project/vendor",
        "vendor",
        "etc",
        ...Array.from({ length: 10 }, (_, i) => `many/${i}`)
      ]) {
        mkdirSync(at(name), { recursive: true })
        writeFileSync(path.join(at(name), "name"), name)
      }
      writeFileSync(at("file"), "single")
      writeFileSync(at("other"), "other")
      const vm = yield* boot({
        liveMounts: [
          { host: at("vendor"), guest: "/work/project/vendor", mode: "ro" },
          { host: at("project"), guest: "/work/project" },
          { host: at("etc"), guest: "/etc" },
          { host: at("file"), guest: "/srv/deep/in/file" },
          { host: at("other"), guest: "/bin/busybox.conf", mode: "ro" },
          ...Array.from({ length: 10 }, (_, i) => ({ host: at(`many/${i}`), guest: `/many/${i}` }))
        ]
      })
      const names = "cat /work/project/name; echo; cat /work/project/vendor/name; echo; cat /etc/name"
      assert.strictEqual(yield* sh(vm, names), "project\nvendor\netc")
      assert.strictEqual(yield* sh(vm, "ls /etc"), "name", "what was there is hidden")
      assert.strictEqual(
        yield* sh(vm, "for i in 0 1 2 3 4 5 6 7 8 9; do echo $i >>/many/$i/name; done; cat /many/*/name"),
        Array.from({ length: 10 }, (_, i) => `many/${i}${i}`).join("\n")
      )
      assert.strictEqual(
        yield* sh(vm, "cat /srv/deep/in/file; echo more >>/srv/deep/in/file; cat /bin/busybox.conf"),
        "singleother"
      )
      assert.strictEqual(readFileSync(at("file"), "utf8"), "singlemore\n")
      for (const place of ["/work/project/vendor/x", "/bin/busybox.conf"]) {
        const { exitCode, stderr } = yield* vm.execRaw(`echo x >>${place}`)
        assert.notStrictEqual(exitCode, 0)
        assert.include(text(stderr), "Read-only file system")
      }
      yield* sh(vm, "echo x >/work/project/made")
      assert.strictEqual(readFileSync(at("project/made"), "utf8"), "x\n")
      assert.lengthOf(servers(vm.entry.id), 1)
    }).pipe(Effect.provide(live(home)))
  )

  it.scoped("leave the host's files of a machine's name to the host, in copies too", () =>
    Effect.gen(function* () {
      const etc = temporaryDirectory()
      const files = { hostname: "original\n", hosts: "127.0.1.1\toriginal\n", "machine-id": `${"0".repeat(32)}\n` }
      for (const [name, content] of Object.entries(files)) writeFileSync(path.join(etc, name), content)
      const vm = yield* boot({ name: "original", liveMounts: [{ host: etc, guest: "/etc" }] })
      const [sibling] = (yield* (yield* Machinen).fork(vm)).siblings
      assert.notStrictEqual(sibling === undefined ? "" : yield* sh(sibling.vm, "hostname"), "original")
      for (const [name, content] of Object.entries(files)) {
        assert.strictEqual(readFileSync(path.join(etc, name), "utf8"), content, name)
      }
    }).pipe(Effect.provide(live(home)))
  )

  it.scopedLive("whose server is killed give errors, and the VM goes on and says so", () =>
    Effect.gen(function* () {
      const host = temporaryDirectory()
      writeFileSync(path.join(host, "file"), "here")
      const vm = yield* boot({ liveMounts: [{ host, guest: "/work" }] })
      assert.strictEqual(yield* sh(vm, "cat /work/file"), "here")
      const shown = () => cli(home, ["inspect", vm.entry.id])
      assert.isNull(JSON.parse((yield* shown()).stdout).liveMountsLost)
      const [server] = servers(vm.entry.id)
      // never with 0, which is this process's own group
      if (server === undefined) return assert.fail("the VM has no server")
      process.kill(server.pid, "SIGKILL")
      yield* eventually("the entry to say so", () => vmEntry(home, vm.entry.id)?.liveMountsLost !== undefined)
      const { exitCode, stderr } = yield* vm.execRaw("cat /work/file")
      assert.notStrictEqual(exitCode, 0)
      assert.match(text(stderr), /Transport endpoint is not connected|Socket not connected/)
      assert.strictEqual(yield* sh(vm, "echo alive"), "alive")
      const why = "machinen-share was ended by signal 9: the shared directories are gone"
      assert.strictEqual(JSON.parse((yield* shown()).stdout).liveMountsLost, why)
      assert.include((yield* cli(home, ["logs", "--console", vm.entry.id])).stdout, `machinen: ${why}`)
    }).pipe(Effect.provide(live(home)))
  )

  it.scopedLive("work for an ordinary user of the host, whose files are the guest's root's", () =>
    Effect.gen(function* () {
      const dir = temporaryDirectory()
      const [own, hidden] = [path.join(dir, "own"), path.join(dir, "own", "hidden")]
      for (const name of ["home", "cache", "own"]) mkdirSync(path.join(dir, name))
      writeFileSync(path.join(own, "theirs"), "mine")
      writeFileSync(hidden, "of another user", { mode: 0o600 })
      const { MACHINEN_ASSETS_STORE: assets = "", MACHINEN_CACHE_DIR: cache = "" } = environment(home)
      for (const name of readdirSync(cache).filter((name) => name.startsWith("host-"))) {
        copyFileSync(path.join(cache, name), path.join(dir, "cache", name))
      }
      const asRoot = process.getuid?.() === 0
      const [uid, gid] = asRoot ? [65534, 65534] : [process.getuid?.() ?? 0, process.getgid?.() ?? 0]
      if (asRoot) execFileSync("chown", ["-R", `${uid}:${gid}`, path.join(dir, "home"), path.join(dir, "cache"), own])
      if (asRoot) chownSync(hidden, 0, 0)
      else rmSync(hidden)
      chmodSync(path.dirname(dir), 0o755)
      chmodSync(dir, 0o755)
      // the assets and this checkout may lie where only root may look
      const seen = path.join(dir, "seen")
      const repository = path.resolve(import.meta.dirname, "..", "..")
      const script = `echo guest >/work/made; mkdir /work/dir; stat -c '%u:%g' /work/theirs /work/made; cat /work/theirs; cat /work/hidden 2>&1`
      const command = `node ${path.join(seen, "repository", "dist", "cli.js")} run --image micro --network none --mount-live ${own}:/work:uid=7 --mount-live ${own}:/root/own -- sh -c "$0; stat -c %u /root/own/made"`
      const user = asRoot ? `setpriv --reuid=${uid} --regid=${gid} --clear-groups` : ""
      for (const name of ["assets", "repository"]) mkdirSync(path.join(seen, name), { recursive: true })
      const ran = spawnSync(
        "unshare",
        [
          ...(asRoot ? ["--mount"] : ["--mount", "--map-current-user"]),
          ...["sh", "-ec"],
          `mount --bind ${assets} ${seen}/assets; mount --bind ${repository} ${seen}/repository; exec ${user} ${command}`,
          script
        ],
        {
          encoding: "utf8",
          env: {
            ...process.env,
            ...environment(path.join(dir, "home")),
            HOME: path.join(dir, "home"),
            MACHINEN_CACHE_DIR: path.join(dir, "cache"),
            MACHINEN_ASSETS_STORE: path.join(seen, "assets")
          }
        }
      )
      const denied = asRoot
        ? "cat: can't open '/work/hidden': Permission denied"
        : "cat: can't open '/work/hidden': No such file or directory"
      assert.deepStrictEqual(ran.stdout.trim().split("\n"), ["7:0", "7:0", `mine${denied}`, "0"], ran.stderr)
      const made = statSync(path.join(own, "made"))
      assert.deepStrictEqual([made.uid, made.gid], [uid, gid])
      assert.strictEqual(statSync(path.join(own, "dir")).uid, uid)
    })
  )
})

const share = temporaryDirectory()
const at = (name: string) => path.join(share, name)
afterAll(() => settled(home))

layer(guest(home, { image: "debian", liveMounts: [{ host: share, guest: "/work" }] }), {
  excludeTestServices: true,
  timeout: 60_000
})("files of a live mount", (it) => {
  it.effect("that are open stay what they are, whatever happens to their names", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      // Each act is done to a file that is open and whose name is another's, or gone. Only the open one may change.
      const program = `
import os, stat
os.chdir("/work")
acts = {
  "ftruncate": lambda fd: os.ftruncate(fd, 0),
  "grow": lambda fd: os.ftruncate(fd, 5000),
  "fchmod": lambda fd: os.fchmod(fd, 0o611),
  "fchown": lambda fd: os.fchown(fd, 77, 88),
  "futimens": lambda fd: os.utime(fd, (1000, 2000)),
  "fallocate": lambda fd: os.posix_fallocate(fd, 0, 9000),
  "write": lambda fd: os.pwrite(fd, b"changed", 0),
  "fsetxattr": lambda fd: os.setxattr(fd, "user.k", b"v"),
}
def all_of(info): return (info.st_ino, info.st_mode, info.st_uid, info.st_gid, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
for how in ("renamed over", "unlinked", "renamed away"):
  for name, act in acts.items():
    for f in ("a", "b", "c"):
      if os.path.exists(f): os.unlink(f)
    open("a", "w").write("old\\n")
    fd = os.open("a", os.O_RDWR | os.O_APPEND)
    own = os.fstat(fd).st_ino
    other = None
    if how == "renamed over":
      open("b", "w").write("precious\\n"); os.rename("b", "a"); other = "a"
    elif how == "unlinked":
      os.unlink("a"); open("a", "w").write("precious\\n"); other = "a"
    else:
      os.rename("a", "c"); open("a", "w").write("precious\\n"); other = "a"
    before = all_of(os.stat(other))
    act(fd)
    mine = os.fstat(fd)
    assert mine.st_ino == own, (how, name, "another file")
    assert all_of(os.stat(other)) == before, (how, name, "the other file changed")
    assert open(other).read() == "precious\\n", (how, name)
    if name == "ftruncate": assert mine.st_size == 0, how
    if name == "grow": assert mine.st_size == 5000, how
    if name == "fchmod": assert stat.S_IMODE(mine.st_mode) == 0o611, how
    if name == "fchown": assert (mine.st_uid, mine.st_gid) == (77, 88), how
    if name == "futimens": assert (mine.st_atime, mine.st_mtime) == (1000, 2000), how
    if name == "fallocate": assert mine.st_size == 9000, how
    if name == "fsetxattr": assert os.getxattr(fd, "user.k") == b"v", how
    os.close(fd)
import tempfile
with tempfile.TemporaryFile(dir="/work") as f:
  f.write(b"x" * 10000); f.flush(); f.truncate(10); f.seek(0); assert f.read() == b"x" * 10
with tempfile.NamedTemporaryFile(dir="/work") as f:
  os.unlink(f.name); f.write(b"y"); f.flush(); f.truncate(0); assert os.fstat(f.fileno()).st_size == 0
  open(f.name, "w").close()
print("kept")
`
      assert.strictEqual(yield* python(vm, program), "kept")
      const script =
        "cd /work; echo old >s; exec 3>>s; echo precious >t; mv t s; python3 -c 'import os; os.ftruncate(3, 0)'; cat s"
      assert.strictEqual(yield* sh(vm, script), "precious")
      assert.strictEqual(readFileSync(at("s"), "utf8"), "precious\n")
    })
  )

  it.effect("hold databases: sqlite in WAL mode, with writers beside each other", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      const program = `
import os, sqlite3, subprocess, sys
path = "/work/db"
db = sqlite3.connect(path)
assert db.execute("pragma journal_mode=wal").fetchone()[0] == "wal"
db.execute("create table t (who, n)"); db.commit()
writer = '''
import sqlite3, sys
db = sqlite3.connect("/work/db", timeout=60)
for n in range(40):
    db.execute("insert into t values (?, ?)", (sys.argv[1], n)); db.commit()
'''
writers = [subprocess.Popen([sys.executable, "-c", writer, str(i)]) for i in range(3)]
assert all(w.wait() == 0 for w in writers)
print(db.execute("select count(*), count(distinct who) from t").fetchone(), db.execute("pragma integrity_check").fetchone()[0])
`
      assert.strictEqual(yield* python(vm, program), "(120, 3) ok")
    })
  )

  it.effect("can be mapped for writing, by several at once, and the host sees it", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      const program = `
import mmap, os
fd = os.open("/work/mapped", os.O_RDWR | os.O_CREAT); os.ftruncate(fd, 8192)
one, other = mmap.mmap(fd, 8192), mmap.mmap(os.open("/work/mapped", os.O_RDWR), 8192)
if os.fork() == 0:
    one[4096:4101] = b"child"; os._exit(0)
os.wait()
one[0:6] = b"parent"
assert other[0:6] == b"parent" and other[4096:4101] == b"child"
one.flush()
print(os.pread(fd, 6, 0).decode())
`
      assert.strictEqual(yield* python(vm, program), "parent")
      const seen = readFileSync(at("mapped"))
      assert.deepStrictEqual(
        [seen.subarray(0, 6).toString(), seen.subarray(4096, 4101).toString()],
        ["parent", "child"]
      )
    })
  )

  it.scoped("can be locked against the host, both ways", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      writeFileSync(at("lock"), "")
      const hold = "echo >/work/held; exec sleep 1000"
      const holder = yield* vm.start({ argv: ["flock", "--no-fork", "/work/lock", "sh", "-c", hold] })
      yield* eventually("the guest's lock", () => existsSync(at("held")))
      assert.strictEqual(spawnSync("flock", ["-n", at("lock"), "true"]).status, 1)
      yield* holder.signal(9)
      yield* eventually("the lock's end", () => spawnSync("flock", ["-n", at("lock"), "true"]).status === 0)
      const { exitCode } = yield* Effect.acquireUseRelease(
        Effect.sync(() => spawn("flock", ["--no-fork", at("lock"), "sleep", "1000"], { stdio: "ignore" })),
        () =>
          Effect.zipRight(
            eventually("the host's lock", () => spawnSync("flock", ["-n", at("lock"), "true"]).status === 1),
            vm.execRaw("flock -n /work/lock true")
          ),
        (holder) => Effect.sync(() => void holder.kill("SIGKILL"))
      )
      assert.strictEqual(exitCode, 1)
    })
  )

  it.effect("are fifos and sockets for the guest's processes, and no devices", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      const program = `
import os, socket, stat
os.chdir("/work")
os.mkfifo("fifo")
if os.fork() == 0:
    open("fifo", "w").write("through"); os._exit(0)
print(open("fifo").read()); os.wait()
server = socket.socket(socket.AF_UNIX); server.bind("socket"); server.listen()
client = socket.socket(socket.AF_UNIX); client.connect("socket")
peer, _ = server.accept(); client.send(b"hello"); print(peer.recv(9).decode())
for kind in (stat.S_IFCHR, stat.S_IFBLK):
    try: os.mknod("device", kind | 0o666, os.makedev(1, 5)); print("made")
    except OSError as e: print(e.strerror)
`
      const [fifo, socket, ...devices] = (yield* python(vm, program)).split("\n")
      assert.deepStrictEqual([fifo, socket], ["through", "hello"])
      assert.deepStrictEqual(devices, ["Operation not permitted", "Operation not permitted"])
      assert.isTrue(statSync(at("fifo")).isFIFO() && statSync(at("socket")).isSocket())
      assert.isFalse(existsSync(at("device")))
    })
  )

  it.effect("have one identity under all their names, and space and holes as the host's have", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      writeFileSync(at("one"), "1")
      linkSync(at("one"), at("two"))
      const program = `
import os
os.chdir("/work")
one, two = os.stat("one"), os.stat("two")
assert (one.st_ino, one.st_dev, one.st_nlink) == (two.st_ino, two.st_dev, 2), (one, two)
os.link("one", "three"); assert os.stat("two").st_nlink == 3
open("two", "a").write("2"); assert open("three").read() == "12"
os.unlink("one"); assert os.stat("three").st_nlink == 2
fd = os.open("sparse", os.O_RDWR | os.O_CREAT); os.pwrite(fd, b"end", 5 << 30)
assert os.lseek(fd, 0, os.SEEK_DATA) > 0 and os.fstat(fd).st_blocks < 100 and os.fstat(fd).st_size == (5 << 30) + 3
to = os.open("copied", os.O_RDWR | os.O_CREAT); os.pwrite(to, b"....", 0)
assert os.copy_file_range(fd, to, 3, 5 << 30, 1) == 3; assert os.pread(to, 9, 0) == b".end"
names = [bytes([b]) * 3 for b in range(1, 256) if b != 47] + [b"x" * 255]
os.mkdir("names")
for name in names: open(b"names/" + name, "w").close()
assert sorted(os.listdir(b"names")) == sorted(names)
os.setxattr("three", "user.kind", b"value"); assert os.listxattr("three") == ["user.kind"]
os.mkdir("many")
for i in range(3000): open("many/%d" % i, "w").close()
assert len(os.listdir("many")) == 3000
print("same")
`
      assert.strictEqual(yield* python(vm, program), "same")
      assert.strictEqual(statSync(at("two")).nlink, 2)
      assert.lengthOf(readdirSync(at("many")), 3000)
    })
  )

  it.effect("are as the host leaves them at the guest's next look", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      mkdirSync(at("dir"))
      const look = (script: string) => sh(vm, `cd /work/dir; ${script}`)
      for (let n = 100; n < 125; n++) {
        // of one length, and of one moment
        writeFileSync(at("dir/file"), `version ${n}`)
        utimesSync(at("dir/file"), 1_000_000, 1_000_000)
        assert.strictEqual(yield* look("cat file"), `version ${n}`)
        appendFileSync(at("dir/file"), "+")
        assert.strictEqual(yield* look("stat -c %s file; cat file"), `12\nversion ${n}+`)
        truncateSync(at("dir/file"), 3)
        assert.strictEqual(yield* look("cat file; ls"), "verfile")
        renameSync(at("dir/file"), at("dir/other"))
        assert.strictEqual(yield* look("ls; test -e file || echo gone"), "other\ngone")
        chmodSync(at("dir/other"), 0o600 + (n % 8))
        assert.strictEqual(yield* look("stat -c %a other"), (0o600 + (n % 8)).toString(8))
        rmSync(at("dir/other"))
        assert.strictEqual(yield* look("test -e other || echo gone; ls"), "gone")
      }
    })
  )

  it.effect("take every kind of tool's work: tar, cp, find and rm of a tree", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      const script = `
set -e
cp -a /usr/share/perl5 /work/tree; cd /work
tar cf tree.tar tree; mkdir unpacked; tar xf tree.tar -C unpacked
diff -r tree /usr/share/perl5; diff -r tree unpacked/tree
find tree -type f | wc -l; rm -r tree unpacked tree.tar; ls -d tree* unpacked* 2>/dev/null || echo removed
`
      const [files, removed] = (yield* sh(vm, script)).split("\n")
      assert.isAbove(Number(files), 50)
      assert.strictEqual(removed, "removed")
    })
  )
})

describe("two VMs that share a directory", () => {
  it.scoped("see each other's locks and changes", () =>
    Effect.gen(function* () {
      const host = temporaryDirectory()
      const both = { image: "debian", liveMounts: [{ host, guest: "/work" }] }
      const [one, other] = yield* Effect.all([boot(both), boot(both)])
      const hold =
        "import fcntl, time; f = open('/work/db', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); open('/work/held', 'w'); time.sleep(1000)"
      const holder = yield* one.start({ argv: ["python3", "-c", hold] })
      yield* eventually("the lock", () => existsSync(path.join(host, "held")))
      const attempt = `
import fcntl
f = open('/work/db', 'r+')
try: fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB); print("mine")
except BlockingIOError: print("held")
`
      assert.strictEqual(yield* python(other, attempt), "held")
      yield* holder.signal(9)
      yield* sh(one, `while kill -0 ${holder.pid} 2>/dev/null; do sleep 0.02; done`)
      assert.strictEqual(yield* python(other, attempt), "mine")
      for (let n = 0; n < 20; n++) {
        yield* sh(one, `echo ${n} >/work/n`)
        assert.strictEqual(yield* sh(other, "cat /work/n"), String(n))
      }
    }).pipe(Effect.provide(live(home)))
  )
})
