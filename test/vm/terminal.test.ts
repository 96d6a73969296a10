import { existsSync, readFileSync } from "node:fs"
import * as path from "node:path"
import { afterAll, assert, layer } from "@effect/vitest"
import { Effect, Fiber, Stream } from "effect"
import type { Terminal, TerminalCommand, TerminalOptions } from "../../src/guest/Terminal.ts"
import { Machinen } from "../../src/Machinen.ts"
import type { Vm } from "../../src/vm/Vm.ts"
import {
  cli,
  cliPath,
  eventually,
  Guest,
  guest,
  hostProcesses,
  newBundle,
  settled,
  sh,
  temporaryDirectory,
  temporaryHome,
  text
} from "../fixtures.ts"
import * as tmux from "../tmux.ts"

const home = temporaryHome()
afterAll(() => settled(home))

const size = { columns: 80, rows: 24 }
const open = (vm: Vm, command: TerminalCommand, options: Partial<TerminalOptions> = {}) =>
  vm.terminal(command, { ...size, ...options })

/** All a terminal shows to its end, and its exit code. */
const whole = (terminal: Terminal) =>
  Effect.gen(function* () {
    const shown = yield* Stream.runCollect(terminal.output)
    const { code } = yield* terminal.exit
    return { shown: text(Buffer.concat([...shown])), code }
  })

/** Follows what it shows. */
const follow = (terminal: Terminal) =>
  Effect.gen(function* () {
    const pieces: Array<string> = []
    const shown = () => pieces.join("")
    const fiber = yield* Effect.forkScoped(
      Stream.runForEach(terminal.output, (bytes) => Effect.sync(() => void pieces.push(text(bytes))))
    )
    const shows = (wanted: string) =>
      eventually(`${wanted} in ${JSON.stringify(shown())}`, () => shown().includes(wanted)).pipe(Effect.map(shown))
    return { shows, end: Fiber.join(fiber), type: (keys: string) => terminal.write(Buffer.from(keys)) }
  })

layer(guest(home, { memoryMib: 256 }), { excludeTestServices: true, timeout: 60_000 })("a terminal", (it) => {
  it.scoped("belongs to its command, which has a session of its own", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      const script =
        "tty; stty size; echo $TERM $PWD; [ $$ = $(cut -d' ' -f6 /proc/$$/stat) ] && echo leads; echo oops >&2; exit 7"
      const terminal = yield* open(
        vm,
        { argv: ["sh", "-c", script], env: { TERM: "vt220" }, cwd: "/etc" },
        { columns: 132, rows: 43 }
      )
      assert.isAbove(terminal.pid, 1000)
      const { code, shown } = yield* whole(terminal)
      assert.strictEqual(shown, "/dev/pts/0\r\n43 132\r\nvt220 /etc\r\nleads\r\noops\r\n")
      assert.strictEqual(code, 7)
    })
  )

  it.scoped("shows all that is written, up to the last byte before the end", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      const terminal = yield* open(vm, "dd if=/dev/zero bs=64k count=64 2>/dev/null | tr '\\000' x; printf end")
      const { shown } = yield* whole(terminal)
      assert.strictEqual(shown.length, 64 * 65536 + 3)
      assert.isTrue(shown.endsWith("xend"))
    })
  )

  it.scoped("is typed into, interrupted and resized", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      const terminal = yield* open(vm, "trap 'stty size' WINCH; while :; do read line && echo got $line; done")
      const { shows, type } = yield* follow(terminal)
      yield* type("a line\r")
      yield* shows("got a line")
      yield* terminal.resize({ columns: 400, rows: 50 })
      yield* shows("50 400")
      yield* type("\x03")
      const { code, signal } = yield* terminal.exit
      assert.deepStrictEqual({ code, signal }, { code: 130, signal: 2 })
    })
  )

  it.scoped("is a login shell when no command is named", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      const terminal = yield* open(vm, {})
      yield* terminal.write(Buffer.from("echo shell $0; exit 3\r"))
      const { code, shown } = yield* whole(terminal)
      assert.include(shown, "shell sh\r\n")
      assert.strictEqual(code, 3)
    })
  )

  it.effect("takes with it what runs in it when its client leaves, hang-ups ignored or not", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      yield* Effect.scoped(
        Effect.gen(function* () {
          const terminal = yield* open(vm, { argv: ["sh", "-i"] })
          const { shows, type } = yield* follow(terminal)
          yield* type("(trap '' HUP TERM; sleep 98765) &\r")
          yield* type("sleep 98765 & trap '' HUP; echo ready$((1+1)); (trap '' HUP; sleep 98765)\r")
          yield* shows("ready2")
          yield* eventuallyRunning(vm, "sleep 98765", 3)
        })
      )
      yield* eventuallyRunning(vm, "sleep 98765", 0)
    })
  )

  const refused: ReadonlyArray<
    readonly [what: string, command: TerminalCommand, options: Partial<TerminalOptions>, code: string]
  > = [
    ["no columns", "true", { columns: 0 }, "EXEC_TERMINAL_SIZE_INVALID"],
    ["no rows", "true", { rows: 0 }, "EXEC_TERMINAL_SIZE_INVALID"],
    ["more than a terminal can have", "true", { rows: 65_536 }, "EXEC_TERMINAL_SIZE_INVALID"],
    ["part of a column", "true", { columns: 80.5 }, "EXEC_TERMINAL_SIZE_INVALID"],
    ["a session without a name", "true", { session: "" }, "EXEC_SESSION_INVALID"],
    ["a session that is a path", "true", { session: "../x" }, "EXEC_SESSION_INVALID"],
    ["a command that is not there", { argv: ["no-such-command"] }, {}, "EXEC_COMMAND_NOT_FOUND"],
    ["a directory that is not there", { argv: ["sh"], cwd: "/no/such" }, {}, "EXEC_CWD_INVALID"],
    ["NUL in the environment", { env: { A: "\0" } }, {}, "EXEC_ARGUMENT_INVALID"]
  ]
  for (const [what, command, options, code] of refused) {
    it.effect(`is refused: ${what}`, () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const error = yield* Effect.flip(Effect.asVoid(Effect.scoped(open(vm, command, options))))
        assert.strictEqual(error.code, code)
        assert.deepStrictEqual(yield* vm.sessions, [])
      })
    )
  }

  it.effect("a session goes on without its client, and shows its screen to the next", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      const session = { session: "work" }
      yield* Effect.scoped(
        Effect.gen(function* () {
          const { shows, type } = yield* follow(yield* open(vm, { argv: ["sh"] }, session))
          yield* type("V=kept; echo one; printf '\\033[1;31mred\\033[m\\n'\r")
          yield* shows("red\x1b[m")
          const [listed, ...others] = yield* vm.sessions
          assert.deepStrictEqual(others, [])
          assert.deepInclude(listed, { name: "work", argv: ["sh"], attached: true, ...size, ended: null })
          const busy = yield* Effect.flip(Effect.asVoid(Effect.scoped(open(vm, {}, session))))
          assert.strictEqual(busy.code, "EXEC_SESSION_IN_USE")
        })
      )
      yield* eventuallyDetached(vm)
      yield* Effect.scoped(
        Effect.gen(function* () {
          const { shows, type } = yield* follow(yield* open(vm, { argv: ["ignored"] }, { ...session, columns: 90 }))
          const screen = yield* shows("red")
          assert.match(screen, /one.*red/s)
          assert.include(screen.slice(0, screen.lastIndexOf("red")), "\x1b[31;1m")
          yield* type("echo $V; stty size\r")
          yield* shows("kept\r\n24 90")

          // somebody else takes it
          const taken = yield* open(vm, {}, { ...session, steal: true })
          const other = yield* follow(taken)
          yield* other.type("echo taken; exit 5\r")
          yield* other.end
          assert.strictEqual((yield* taken.exit).code, 5)
        })
      )
      assert.deepStrictEqual(yield* vm.sessions, [])
    })
  )

  it.effect("a client that loses its session to another is told", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const vm = yield* Guest
        const first = yield* follow(yield* open(vm, { argv: ["sh"] }, { session: "one" }))
        yield* open(vm, {}, { session: "one", steal: true })
        const lost = yield* Effect.flip(first.end)
        assert.strictEqual(lost.code, "EXEC_SESSION_IN_USE")
        yield* vm.killSession("one")
      })
    )
  )

  it.effect("a session that ends alone tells how to the first client that comes", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      yield* Effect.scoped(open(vm, "echo all done; read x; exit 9", { session: "job" }))
      yield* eventuallyDetached(vm)
      const [job] = yield* vm.sessions
      yield* vm.exec(`kill -HUP ${job?.pid}`)
      const ended = yield* vm.sessions.pipe(
        Effect.map((list) => list.find(({ ended }) => ended !== null)),
        Effect.repeat({ until: (found) => found !== undefined }),
        Effect.timeout("20 seconds")
      )
      assert.strictEqual(ended?.ended?.signal, 1)
      const { code, shown } = yield* Effect.scoped(Effect.flatMap(open(vm, {}, { session: "job" }), whole))
      assert.include(shown, "all done")
      assert.strictEqual(code, 129)
      assert.deepStrictEqual(yield* vm.sessions, [])
    })
  )

  it.effect("a session is killed with all that runs in it; one that is not there is not known", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      yield* Effect.scoped(
        open(vm, { argv: ["sh", "-c", "set -m; trap '' HUP; sleep 56789 & sleep 56789"] }, { session: "stubborn" })
      )
      yield* eventuallyRunning(vm, "sleep 56789", 2)
      yield* vm.killSession("stubborn")
      assert.strictEqual(yield* running(vm, "sleep 56789"), 0)
      assert.deepStrictEqual(yield* vm.sessions, [])
      assert.strictEqual((yield* Effect.flip(vm.killSession("stubborn"))).code, "EXEC_SESSION_NOT_FOUND")
    })
  )

  it.effect("there are 64 sessions at most; one that has ended makes room", () =>
    Effect.gen(function* () {
      const vm = yield* Guest
      const session = (n: number) => Effect.scoped(open(vm, { argv: ["cat"] }, { session: `s${n}` }))
      yield* Effect.forEach(Array.from({ length: 64 }).keys(), session, { concurrency: 8, discard: true })
      const refused = yield* Effect.flip(Effect.asVoid(session(64)))
      assert.strictEqual(refused.code, "EXEC_GUEST_BUSY")
      assert.include(refused.message, "64 sessions")
      const list = yield* vm.sessions
      assert.lengthOf(list, 64)
      yield* vm.exec(`kill -HUP ${list.find(({ name }) => name === "s7")?.pid}`)
      yield* Effect.asVoid(session(64)).pipe(Effect.retry({ times: 100 }))
      const names = (yield* vm.sessions).map(({ name }) => name)
      assert.lengthOf(names, 64)
      assert.notInclude(names, "s7")
      yield* Effect.forEach(names, vm.killSession, { concurrency: 16, discard: true })
      assert.deepStrictEqual(yield* vm.sessions, [])
    })
  )

  it.effect("goes on in every copy of its machine, each apart from the others", () =>
    Effect.scoped(
      Effect.gen(function* () {
        const vm = yield* Guest
        const machinen = yield* Machinen
        const session = { session: "shell" }
        // attached while the machine is copied: the copies have lost their clients, not their sessions
        const source = yield* follow(yield* open(vm, { argv: ["sh"] }, session))
        yield* source.type("V=before; echo $V ready\r")
        yield* source.shows("before ready")
        const { siblings } = yield* machinen.fork(vm, { count: 2 })
        assert.strictEqual(siblings.length, 2)
        for (const [n, { vm: sibling }] of siblings.entries()) {
          const [listed] = yield* sibling.sessions
          assert.deepInclude(listed, { name: "shell", attached: false, ended: null })
          const copy = yield* follow(yield* open(sibling, {}, session))
          yield* copy.shows("before ready")
          yield* copy.type(`echo $V $V; V=copy${n}; echo now $V\r`)
          yield* copy.shows("before before")
          yield* copy.shows(`now copy${n}`)
        }
        yield* source.type("echo still $V\r")
        yield* source.shows("still before")
        yield* vm.killSession("shell")
      })
    )
  )
})

const eventuallyDetached = (vm: Vm) =>
  vm.sessions.pipe(
    Effect.repeat({ until: (list) => list.every(({ attached }) => !attached) }),
    Effect.timeout("20 seconds")
  )

/** How many processes of the guest run this. */
const running = (vm: Vm, what: string) => Effect.map(sh(vm, `ps -e -o args= | grep -F -x -c '${what}' || true`), Number)

const eventuallyRunning = (vm: Vm, what: string, n: number) =>
  running(vm, what).pipe(
    Effect.repeat({ until: (found) => found === n }),
    Effect.timeout("20 seconds"),
    Effect.orElse(() => Effect.dieMessage(`never ${n} × ${what}`))
  )

layer(guest(home, { image: "debian", name: "tty" }), { excludeTestServices: true, timeout: 60_000 })(
  "in a real terminal",
  (it) => {
    it.scoped("a shell has job control, full-screen programs and the window's size, and the code it ends with", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const window = yield* tmux.window(home, cliPath)
        yield* window.type("stty -g > before; machinen attach tty")
        yield* window.press("Enter")
        yield* window.shows("root@tty:/#")
        yield* window.type("tty; stty size; echo $TERM")
        yield* window.press("Enter")
        yield* window.shows(/\/dev\/pts\/\d+\n30 100\ntmux-256color/)

        // ctrl-c ends what runs in the foreground, ctrl-z stops it, fg brings it back
        yield* window.type("sleep 4321")
        yield* window.press("Enter")
        yield* eventuallyRunning(vm, "sleep 4321", 1)
        yield* window.press("C-c")
        yield* window.shows("^C")
        yield* eventuallyRunning(vm, "sleep 4321", 0)
        yield* window.type("sleep 54321")
        yield* window.press("Enter")
        yield* eventuallyRunning(vm, "sleep 54321", 1)
        yield* window.press("C-z")
        yield* window.shows(/\[1\]\+ +Stopped +sleep 54321/)
        yield* window.type("fg")
        yield* window.press("Enter")
        yield* window.shows(/fg\nsleep 54321$/)
        yield* window.press("C-c")
        yield* eventuallyRunning(vm, "sleep 54321", 0)

        yield* window.type("clear; top")
        yield* window.press("Enter")
        yield* window.shows(/^top - .*load average.*[\s\S]*PID USER[\s\S]*top$/m)
        yield* window.press("q")
        // top discards what is typed before it has ended
        yield* eventuallyRunning(vm, "top", 0)

        yield* window.resize(80, 20)
        yield* window.type("clear; stty size")
        yield* window.press("Enter")
        yield* window.shows("20 80")

        yield* window.type("exit 7")
        yield* window.press("Enter")
        yield* window.shows(/^\$$/m)
        yield* window.type("echo code $?; stty -g | cmp - before && echo as before")
        yield* window.press("Enter")
        yield* window.shows(/^code 7\nas before$/m)
      })
    )

    it.scoped("a session shows the same screen after it was left, in vi too, and as before when that ends", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const window = yield* tmux.window(home, cliPath)
        // the prompt is at the line's beginning: our terminal was its own again before anything was said
        const detached = /\[detached from session edit of VM tty\]\n\$$/
        const attach = Effect.zipRight(window.type("clear; machinen attach tty --session edit"), window.press("Enter"))
        yield* attach
        yield* window.shows("root@tty:/#")
        yield* window.type("V=remembered; vi /tmp/poem")
        yield* window.press("Enter")
        yield* window.shows(/"\/tmp\/poem" \[New File\]/)
        yield* window.type("iroses are red")
        yield* window.press("Enter")
        yield* window.type("violets are blue")
        yield* window.shows("violets are blue")
        const screen = yield* window.screen

        yield* window.press("C-]", "C-]")
        yield* window.shows(detached)
        assert.deepInclude((yield* vm.sessions)[0], { name: "edit", attached: false })
        yield* attach
        yield* window.shows("violets are blue")
        assert.strictEqual(yield* window.screen, screen)

        // and in a fork, apart from this one
        yield* window.press("C-]", "C-]")
        yield* window.shows(detached)
        yield* window.type("clear; machinen fork tty --new-name twin -d && machinen attach twin -s edit")
        yield* window.press("Enter")
        yield* window.shows("violets are blue")
        assert.strictEqual(yield* window.screen, screen)
        yield* window.press("Escape")
        yield* window.type(":q!")
        yield* window.press("Enter")
        yield* window.shows(/vi \/tmp\/poem\nroot@t/)
        yield* window.type("hostname; exit")
        yield* window.press("Enter")
        yield* window.shows(/twin[\s\S]*\n\$$/)
        yield* window.type("clear; machinen stop twin")
        yield* window.press("Enter")
        yield* window.shows(/^twin\n\$$/m)
        yield* attach
        yield* window.shows("violets are blue")
        assert.strictEqual(yield* window.screen, screen)

        yield* window.press("Escape")
        yield* window.type(":wq")
        yield* window.press("Enter")
        yield* window.shows(/vi \/tmp\/poem\nroot@tty/)
        yield* window.type("echo $V; exit 3")
        yield* window.press("Enter")
        yield* window.shows(/^remembered\n[\s\S]*\n\$$/m)
        yield* window.type("echo code $?")
        yield* window.press("Enter")
        yield* window.shows("code 3")
        assert.strictEqual(yield* sh(vm, "cat /tmp/poem"), "roses are red\nviolets are blue")
        assert.deepStrictEqual(yield* vm.sessions, [])
      })
    )

    it.scoped("kill -9 of the client leaves a session, and nothing of a command without one", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const window = yield* tmux.window(home, cliPath)
        for (const [option, left] of [
          ["--session kept", 1],
          ["", 0]
        ] as const) {
          yield* window.type(`clear; machinen attach ${option} tty -- sh -c 'sleep 7654 & sleep 7654' & p=$!; fg`)
          yield* window.press("Enter")
          yield* eventuallyRunning(vm, "sleep 7654", 2)
          yield* Effect.sync(() => signalClients(home, "SIGKILL"))
          yield* window.shows("Killed")
          // nobody has put it back
          yield* window.type("stty sane; echo usable")
          yield* window.press("C-j")
          yield* window.shows(/usable\n\$$/)
          if (left === 1) {
            yield* eventuallyDetached(vm)
            assert.strictEqual(yield* running(vm, "sleep 7654"), 2)
            const list = yield* cli(home, ["sessions", "tty", "--json"])
            assert.deepInclude(JSON.parse(list.stdout)[0], { name: "kept", attached: false, ended: null })
            assert.include((yield* cli(home, ["sessions", "tty"])).stdout, "kept")
            assert.strictEqual((yield* cli(home, ["session-kill", "tty", "kept"])).stdout, "kept\n")
          }
          yield* eventuallyRunning(vm, "sleep 7654", 0)
        }
      })
    )

    it.scoped("our own terminal is as before when the client is told to end, and when its VM is gone", () =>
      Effect.gen(function* () {
        const window = yield* tmux.window(home, cliPath)
        const line = (text: string) => Effect.zipRight(window.type(text), window.press("Enter"))
        yield* line("stty -g > before; machinen boot -d --image micro --name victim")
        yield* window.shows(/^victim\n\$$/m)
        const ends: ReadonlyArray<readonly [end: Effect.Effect<unknown>, code: number, said: string]> = [
          [Effect.sync(() => signalClients(home, "SIGTERM")), 143, ""],
          [cli(home, ["stop", "--force", "victim"]), 137, "EXEC_VM_ENDED"]
        ]
        for (const [end, code, said] of ends) {
          yield* line("clear; machinen attach victim -s s")
          yield* window.shows(/#$/)
          yield* line("printf '\\033[?25l\\033[?1049hfull%s' screen")
          yield* window.shows("fullscreen")
          assert.isFalse(yield* window.cursorIsShown)
          yield* end
          yield* window.shows(/\$$/)
          yield* line("echo code $?; stty -g | cmp - before && echo as before")
          const shown = yield* window.shows(/code \d+\nas before/)
          assert.include(shown, `code ${code}`)
          assert.include(shown, said)
          assert.notInclude(shown, "fullscreen")
          assert.isTrue(yield* window.cursorIsShown)
        }
      })
    )

    it.scoped("exec -t and run -t have a terminal, of a common size where ours has none", () =>
      Effect.gen(function* () {
        const window = yield* tmux.window(home, cliPath)
        yield* window.type(
          "machinen exec -t -e TERM=vt100 -w /tmp tty -- sh -c 'echo $TERM $PWD; stty size; exit 4'; echo code $?"
        )
        yield* window.press("Enter")
        yield* window.shows(/vt100 \/tmp\n30 100\ncode 4\n\$$/)
        yield* window.type("clear; stty cols 0 rows 0; machinen exec -it tty -- stty size; stty cols 100 rows 30")
        yield* window.press("Enter")
        yield* window.shows(/^24 80\n\$$/m)
        yield* window.type(
          "clear; machinen run -t --image micro -- sh -c 'tty; read x; echo got $x; exit 6'; echo code $?"
        )
        yield* window.press("Enter")
        yield* window.shows("/dev/pts/0")
        yield* window.type("this")
        yield* window.press("Enter")
        yield* window.shows(/got this\ncode 6/)
      })
    )

    it.effect("repl runs line after line in one shell, which is there for the next one and in every fork", () =>
      Effect.gen(function* () {
        const repl = (vm: string, ...lines: ReadonlyArray<string>) =>
          cli(home, ["repl", vm], { stdin: Buffer.from(lines.map((line) => `${line}\n`).join("")) })
        const first = yield* repl(
          "tty",
          "cd /tmp; X=5",
          'echo "$X in $PWD"',
          "fi",
          "cat",
          ":fork tty/2",
          ":what",
          "(exit 6)"
        )
        assert.match(first.stdout, /^5 in \/tmp\n.*yntax error.*\ntty\/2 goes on from here\na line runs/s)
        assert.deepStrictEqual([first.stderr, first.code], ["", 6])
        const other = yield* repl("tty/2", "echo $X in $PWD; X=6", ":quit", "echo never")
        assert.deepStrictEqual([other.stdout, other.code], ["5 in /tmp\n", 0])
        yield* cli(home, ["stop", "tty/2"])
        const last = yield* repl("tty", "echo $X", "exit 4", "echo never")
        assert.deepStrictEqual([last.stdout, last.code], ["5\n", 4])
        const failed = yield* repl("tty", ":snapshot /dev/null/x", "echo on; exit")
        assert.include(failed.stderr, "SNAPSHOT_")
        assert.deepStrictEqual([failed.stdout, failed.code], ["on\n", 0])
      })
    )

    it.effect("repl is as a shell is: the status of the line before, commands of several lines, here-documents", () =>
      Effect.gen(function* () {
        const session = [
          ["false"],
          ["echo status $?"],
          ["(exit 7)"],
          ["echo status $?; echo status $?"],
          ["for i in 1 2; do", "  echo $i", "", "done"],
          ["cat <<END", "first", ") $((1 << 2)) 'x", ":quit", "END"],
          ["if true; then cat <<-A; fi; echo after", "\tin if", "A"],
          ["echo 'two", "lines' \"and", 'more"'],
          ["echo one \\", "line"],
          ["f() {", "echo in f; }", "f"],
          ["echo ok &&", "echo both"],
          ["fi"],
          ["echo status $?"],
          ["echo 'not ended", "by its end"]
        ]
        const wanted = [
          "status 1",
          "status 7",
          "status 0",
          "1",
          "2",
          "first",
          ") 4 'x",
          ":quit",
          "in if",
          "after",
          "two",
          "lines and",
          "more"
        ]
        for (const image of ["micro", "debian"]) {
          const name = `repl-${image}`
          yield* Effect.acquireUseRelease(
            Effect.map(cli(home, ["boot", "-d", "--image", image, "--name", name]), ({ code }) =>
              assert.strictEqual(code, 0)
            ),
            () =>
              Effect.gen(function* () {
                const { code, stderr, stdout } = yield* cli(home, ["repl", name], {
                  stdin: Buffer.from(`${session.flat().join("\n")}\n`)
                })
                const lines = stdout.trimEnd().split("\n")
                assert.deepStrictEqual(lines.slice(0, wanted.length), wanted, image)
                assert.deepStrictEqual(lines.slice(wanted.length, wanted.length + 4), [
                  "one line",
                  "in f",
                  "ok",
                  "both"
                ])
                const rest = lines.slice(wanted.length + 4).join("\n")
                assert.match(rest, /yntax error.*\nstatus 2\n.*nterminated/s, image)
                assert.deepStrictEqual([code, stderr], [2, ""], image)
              }),
            () => cli(home, ["stop", "--force", name])
          )
        }
      })
    )

    it.scoped("shows what a command writes as its own terminal made it", () =>
      Effect.gen(function* () {
        const window = yield* tmux.window(home, cliPath)
        const file = path.join(temporaryDirectory(), "typescript")
        yield* window.type(
          `script -qec "'${process.execPath}' '${cliPath}' exec -t tty -- printf 'hello\\n'" ${file}; echo done`
        )
        yield* window.press("Enter")
        yield* window.shows(/^done$/m)
        assert.include(readFileSync(file, "latin1"), "hello\r\n")
        assert.notInclude(readFileSync(file, "latin1"), "\r\r")
        yield* window.type(
          "clear; stty -g > before; machinen exec -t tty -- sh -c 'stty -opost; printf \"ab\\ncd\"'; echo; stty -g | cmp - before && echo as before"
        )
        yield* window.press("Enter")
        yield* window.shows(/ab\n {2}cd\nas before/)
      })
    )

    it.scoped("repl has a prompt, and ctrl-c ends what a line runs, not the shell", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const window = yield* tmux.window(home, cliPath)
        yield* window.type("machinen repl tty")
        yield* window.press("Enter")
        yield* window.shows(/^>$/m)
        yield* window.type("Y=still; sleep 777")
        yield* window.press("Enter")
        yield* eventuallyRunning(vm, "sleep 777", 1)
        yield* window.press("C-c")
        yield* eventuallyRunning(vm, "sleep 777", 0)
        yield* window.type("echo $Y here $?")
        yield* window.press("Enter")
        yield* window.shows(/^still here \d+$/m)
        yield* window.type("exit 3")
        yield* window.press("Enter")
        yield* window.shows(/\$$/)
        yield* window.type("echo code $?")
        yield* window.press("Enter")
        yield* window.shows("code 3")
      })
    )

    it.scoped("says that the guest ran out of memory, once the terminal is as before", () =>
      Effect.gen(function* () {
        const window = yield* tmux.window(home, cliPath)
        yield* window.type("machinen run -t --image micro -m 64 --network none -- tail /dev/zero")
        yield* window.press("Enter")
        yield* window.shows(
          /^machinen: the guest ran out of memory and its kernel killed the command \(--memory\)\n\$$/m
        )
      })
    )

    it.effect("keeps CRIU from saving processes until it is closed, and the error names it", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const machinen = yield* Machinen
        const outDir = newBundle()
        const dump = machinen.snapshot(vm, { outDir, engine: "criu", leaveRunning: true })
        yield* Effect.scoped(open(vm, { argv: ["sh"] }, { session: "open" }))
        const refused = yield* Effect.flip(Effect.asVoid(dump))
        assert.strictEqual(refused.code, "SNAPSHOT_DUMP_FAILED")
        assert.include(`${refused.message} ${refused.cause}`, 'terminal session "open" is open')
        assert.isFalse(existsSync(outDir))
        yield* vm.killSession("open")
        const { bundle } = yield* dump
        assert.strictEqual(bundle.manifest.engine, "criu")
      })
    )

    it.effect("belongs to the user that its command runs as", () =>
      Effect.gen(function* () {
        const vm = yield* Guest
        const command = {
          argv: ["sh", "-c", 'id -un; echo "opened again" > $(tty); exec 3<> /dev/tty && echo controls'],
          user: "nobody"
        }
        const { shown } = yield* Effect.scoped(Effect.flatMap(open(vm, command), whole))
        assert.strictEqual(shown, "nobody\r\nopened again\r\ncontrols\r\n")
      })
    )

    it.effect("a verb that needs a terminal is refused where ours is none", () =>
      Effect.gen(function* () {
        for (const args of [
          ["attach", "tty"],
          ["exec", "-t", "tty", "--", "true"],
          ["run", "-t", "--image", "micro", "--", "true"]
        ]) {
          const { code, stderr } = yield* cli(home, args)
          assert.strictEqual(code, 125, args.join(" "))
          assert.include(stderr, "(EXEC_NO_TERMINAL): the input device is not a TTY")
        }
        const unknown = yield* cli(home, ["session-kill", "tty", "nope"])
        assert.strictEqual(unknown.code, 1)
        assert.include(unknown.stderr, "EXEC_SESSION_NOT_FOUND")
      })
    )
  }
)

/** To the clients that windows run. */
const signalClients = (home: string, signal: NodeJS.Signals) => {
  const clients = hostProcesses().filter(
    ({ argv, environment }) =>
      argv[1] === cliPath && argv[2] === "attach" && environment.includes(`MACHINEN_HOME=${home}`)
  )
  assert.isNotEmpty(clients)
  for (const { pid } of clients) process.kill(pid, signal)
}
