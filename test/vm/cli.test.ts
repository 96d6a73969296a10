import { execFileSync, spawnSync } from "node:child_process"
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs"
import * as path from "node:path"
import { afterEach, assert, describe, it } from "@effect/vitest"
import { Duration, Effect } from "effect"
import {
  type CliOptions,
  cli,
  cliPath,
  collectGarbage,
  environment,
  settled,
  startCli,
  temporaryHome
} from "../fixtures.ts"

const home = temporaryHome()
afterEach(() => settled(home))

const machinen = (args: ReadonlyArray<string>, options?: CliOptions) => cli(home, args, options)
const run = (args: ReadonlyArray<string>, options?: CliOptions) =>
  machinen(["run", "--image", "micro", ...args], options)

/** A detached VM for the test; stopped by the test or here. */
const detached = (name: string, args: ReadonlyArray<string> = []) =>
  Effect.acquireRelease(
    Effect.map(machinen(["boot", "-d", "--image", "micro", "--name", name, ...args]), ({ code, stderr, stdout }) => {
      assert.deepStrictEqual({ code, stderr, stdout: stdout.trim() }, { code: 0, stderr: "", stdout: name })
    }),
    () => machinen(["stop", "--force", name])
  )

// biome-ignore lint/suspicious/noExplicitAny: whatever was printed, the assertions tell
const json = (stdout: string): any => JSON.parse(stdout)

/** A line for bash, in which `M` is the CLI. */
const shell = (line: string) =>
  spawnSync("bash", ["-c", `set -o pipefail; M() { timeout 60 '${process.execPath}' '${cliPath}' "$@"; }; ${line}`], {
    env: { ...process.env, ...environment(home) },
    encoding: "utf8"
  })

describe("output that cannot be written", () => {
  it.scopedLive("ends every verb: silently when the reader has closed the pipe, otherwise with an error message", () =>
    Effect.gen(function* () {
      yield* detached("talker", ["--", "sh", "-c", "while :; do echo line; sleep 0.01; done"])
      const verbs = [
        "ls",
        "ls --json",
        "inspect talker",
        "logs talker",
        "logs -f talker",
        "exec talker -- yes",
        "--help"
      ]
      for (const verb of verbs) {
        const piped = shell(`M ${verb} | true`)
        assert.deepStrictEqual([piped.status, piped.stderr], [141, ""], verb)
        if (verb.includes("yes")) continue
        const full = shell(`M ${verb} >/dev/full`)
        assert.strictEqual(full.status, 1, verb)
        assert.match(
          full.stderr,
          /^machinen: \(OUTPUT_FAILED\): stdout cannot be written to: .*\(ENOSPC\)\n {2}hint: /,
          verb
        )
      }
      const relayed = shell("M exec talker -- echo x >/dev/full")
      assert.strictEqual(relayed.status, 125)
      assert.include(relayed.stderr, "OUTPUT_FAILED")
      const watched = shell(
        "(M watch talker /tmp | head -1; exit $PIPESTATUS) & w=$!; while kill -0 $w 2>/dev/null; do M exec talker -- sh -c 'echo x > /tmp/x; rm /tmp/x'; done; wait $w"
      )
      assert.deepStrictEqual([watched.status, watched.stdout], [141, "created x\n"])
    })
  )
})

describe("signals", () => {
  for (const [signal, code] of [
    ["SIGINT", 130],
    ["SIGTERM", 143],
    ["SIGHUP", 129]
  ] as const) {
    it.scopedLive(`${signal} ends a verb that waits with ${code}`, () =>
      Effect.gen(function* () {
        yield* detached("waited-for")
        const following = yield* startCli(home, ["forward", "waited-for", "80"])
        yield* following.printed("ctrl-c ends it")
        yield* following.kill(signal)
        assert.strictEqual((yield* following.result).code, code)
      })
    )
  }
})

describe("machinen run", () => {
  it.live("streams both channels and ends with the command's code", () =>
    Effect.gen(function* () {
      const { code, stderr, stdout } = yield* run([
        "-e",
        "WHO=world",
        "-w",
        "/etc",
        "--",
        "sh",
        "-c",
        "echo hello $WHO $PWD; echo oops >&2; exit 7"
      ])
      assert.deepStrictEqual({ code, stderr, stdout }, { code: 7, stderr: "oops\n", stdout: "hello world /etc\n" })
    })
  )

  it.live("tells what happens below it when asked, of what was asked", () =>
    Effect.gen(function* () {
      const { code, stderr, stdout } = yield* cli(home, ["run", "--image", "micro", "--", "echo", "done"], {
        env: { DEBUG: "machinen:boot,machinen:registry" }
      })
      assert.deepStrictEqual({ code, stdout }, { code: 0, stdout: "done\n" })
      const lines = stderr.trimEnd().split("\n")
      assert.isTrue(lines.some((line) => / machinen:boot boot took [\d.]+ ms/.test(line)))
      assert.isTrue(lines.some((line) => / machinen:registry Registry\.claim took [\d.]+ ms/.test(line)))
      for (const line of lines) assert.match(line, / machinen:(boot|registry) /)
    })
  )

  const codes: ReadonlyArray<readonly [what: string, argv: ReadonlyArray<string>, code: number, stderr: string]> = [
    ["not found", ["no-such-command"], 127, "EXEC_COMMAND_NOT_FOUND"],
    ["not executable", ["/etc/passwd"], 126, "EXEC_NOT_EXECUTABLE"],
    ["killed", ["sh", "-c", "kill -KILL $$"], 137, ""]
  ]
  for (const [what, argv, code, stderr] of codes) {
    it.live(`ends with ${code}: ${what}`, () =>
      Effect.gen(function* () {
        const result = yield* run(["--", ...argv])
        assert.strictEqual(result.code, code)
        assert.include(result.stderr, stderr)
      })
    )
  }

  it.live("passes stdin on, to its end", () =>
    Effect.gen(function* () {
      const input = Buffer.alloc(300_000, "abc\n")
      const { code, stdout } = yield* run(["--", "cat"], { stdin: input })
      assert.strictEqual(code, 0)
      assert.strictEqual(stdout, input.toString())
    })
  )

  for (const [signal, wanted] of [
    ["SIGTERM", 3],
    ["SIGINT", 4]
  ] as const) {
    it.scopedLive(`forwards ${signal} to the command`, () =>
      Effect.gen(function* () {
        const running = yield* startCli(
          home,
          [
            "run",
            "--image",
            "micro",
            "--",
            "sh",
            "-c",
            "trap 'exit 3' TERM; trap 'exit 4' INT; echo ready; while :; do sleep 0.05; done"
          ],
          { stdin: "open" }
        )
        yield* running.printed("ready")
        yield* running.kill(signal)
        assert.strictEqual((yield* running.result).code, wanted)
      })
    )
  }

  it.scopedLive("ends with 130 on ctrl-c when the command does not handle it", () =>
    Effect.gen(function* () {
      const running = yield* startCli(home, [
        "run",
        "--image",
        "micro",
        "--",
        "sh",
        "-c",
        "echo ready; exec sleep 1000"
      ])
      yield* running.printed("ready")
      yield* running.kill("SIGINT")
      assert.strictEqual((yield* running.result).code, 130)
    })
  )

  it.live("ends when the reader of its output has closed the pipe", () =>
    Effect.sync(() => {
      const { status, stdout } = spawnSync(
        "bash",
        ["-c", `set -o pipefail; timeout 60 "${process.execPath}" "${cliPath}" run --image micro -- yes | head -1`],
        { env: { ...process.env, ...environment(home) }, encoding: "utf8" }
      )
      assert.strictEqual(stdout, "y\n")
      assert.strictEqual(status, 141)
    })
  )

  it.live("ends the command after --timeout", () =>
    Effect.gen(function* () {
      const { code, stderr } = yield* run(["--timeout", "500ms", "--", "sleep", "1000"])
      assert.strictEqual(code, 124)
      assert.include(stderr, "EXEC_AGENT_TIMEOUT")
      const bomb = "b() { b | b & }; b; sleep 1000"
      const [elapsed, starved] = yield* Effect.timed(run(["--timeout", "3s", "--", "sh", "-c", bomb]))
      assert.strictEqual(starved.code, 124)
      // the limit and a start; not the seconds that a guest is otherwise given to power off
      assert.isBelow(Duration.toMillis(elapsed), 10_000)
      const unlimited = yield* run(["--timeout", "0", "--", "sh", "-c", "sleep 1; echo done"])
      assert.deepStrictEqual([unlimited.code, unlimited.stdout], [0, "done\n"])
    })
  )

  it.live("says so when the guest ran out of memory", () =>
    Effect.gen(function* () {
      const { code, stderr } = yield* run(["-m", "64", "--", "sh", "-c", "exec tail /dev/zero"])
      assert.strictEqual(code, 137)
      assert.include(stderr, "ran out of memory")
    })
  )

  for (const [signal, code] of [
    ["SIGTERM", 143],
    ["SIGHUP", 129]
  ] as const) {
    it.scopedLive(`the third ${signal} in short order ends a command that ignores it, with ${code}`, () =>
      Effect.gen(function* () {
        const script = "trap 'echo heard' TERM HUP INT; echo ready; while :; do sleep 0.05; done"
        const running = yield* startCli(home, ["run", "--image", "micro", "--", "sh", "-c", script])
        yield* running.printed("ready")
        yield* running.kill(signal)
        yield* running.printed("heard\n")
        yield* running.kill(signal)
        yield* running.printed("heard\nheard\n")
        yield* running.kill(signal)
        assert.strictEqual((yield* running.result).code, code)
      })
    )
  }

  it.live("refuses arguments that are no text, and keeps clusters of options whole", () =>
    Effect.sync(() => {
      for (const [line, code, said] of [
        ["run --image micro -- echo $'a\\xff'", 125, "PARSE_ARGUMENT_INVALID"],
        ["X=$'\\xff' M run --image micro -e X -- true", 125, "PARSE_FLAG_MALFORMED"],
        ["run --image micro -- echo '\ufffd'", 0, ""],
        ["run -xyz --image micro -- echo ok", 125, "there is no option -x (in -xyz)"]
      ] as const) {
        const { status, stderr } = shell(line.includes("M run") ? line : `M ${line}`)
        assert.strictEqual(status, code, line)
        assert.include(stderr, said)
      }
    })
  )

  const refused: ReadonlyArray<readonly [args: ReadonlyArray<string>, code: string]> = [
    ...["0", "1", "-5", "1e9"].map((memory) => [[`--memory=${memory}`], "BOOT_MEMORY_INVALID"] as const),
    [["--memory", "lots"], "PARSE_FLAG_MALFORMED"],
    [["--memory", ""], "PARSE_FLAG_MALFORMED"],
    [["--vcpus", "0"], "BOOT_VCPUS_INVALID"],
    [["--vcpus", "1000"], "BOOT_VCPUS_INVALID"],
    [["--disk", "1K"], "BOOT_DISK_SIZE_INVALID"],
    [["--disk", "huge"], "PARSE_FLAG_MALFORMED"],
    [["--timeout", "soon"], "PARSE_FLAG_MALFORMED"],
    [["-e", "=x"], "PARSE_FLAG_MALFORMED"],
    [["-w", "relative"], "BOOT_CWD_INVALID"],
    [["--name", "../x"], "REGISTRY_NAME_INVALID"],
    [["--name", "a/../b"], "REGISTRY_NAME_INVALID"],
    [["--name", "/x"], "REGISTRY_NAME_INVALID"],
    [["--name", "123"], "REGISTRY_NAME_INVALID"],
    [["--name", ""], "REGISTRY_NAME_INVALID"],
    [["--name", "a b"], "REGISTRY_NAME_INVALID"],
    [["--root-disk", "/no/such/disk"], "BOOT_OPTION_INVALID"],
    [["--network", "bridge"], "PARSE_FLAG_MALFORMED"],
    [["-p", "80"], "PARSE_PORT_INVALID"],
    [["-p", "8080:80/udp"], "PARSE_PORT_INVALID"],
    [["-p", "8080-8090:80-90"], "PARSE_PORT_INVALID"],
    [["-p", "0:80"], "PARSE_PORT_INVALID"],
    [["-p", "8080:70000"], "PARSE_PORT_INVALID"],
    [["--image", "micro", "--image", "micro"], "PARSE_FLAG_DUPLICATE"],
    [["--no-such-flag"], "PARSE_FLAG_UNKNOWN"],
    [["-p", "web:8080:80"], "BOOT_PORT_FORWARD_INVALID"],
    [["--network", "none", "-p", "8080:80"], "BOOT_PORT_FORWARD_INVALID"],
    [["-p", "8080:80", "-p", "0.0.0.0:8080:81"], "BOOT_PORT_FORWARD_CONFLICT"]
  ]
  for (const [args, code] of refused) {
    it.live(`refuses ${args.join(" ")}`, () =>
      Effect.gen(function* () {
        const result = yield* run([...args, "--", "true"])
        assert.strictEqual(result.code, 125)
        assert.include(result.stderr, `(${code})`)
        assert.include(result.stderr, "hint:")
        assert.strictEqual(result.stdout, "")
      })
    )
  }

  const images: ReadonlyArray<readonly [image: string, code: string]> = [
    ["unknown", "BOOT_IMAGE_NOT_FOUND"],
    ["/no/such/file.tar", "BOOT_IMAGE_NOT_FOUND"],
    ["/etc", "BOOT_IMAGE_INVALID"]
  ]
  for (const [image, code] of images) {
    it.live(`refuses the image ${image}`, () =>
      Effect.gen(function* () {
        const result = yield* machinen(["run", "--image", image, "--", "true"])
        assert.strictEqual(result.code, 125)
        assert.include(result.stderr, `(${code})`)
      })
    )
  }
  it.live("refuses a missing root disk", () =>
    Effect.gen(function* () {
      const result = yield* machinen(["run", "--root-disk", "/no/such/disk", "--", "true"])
      assert.strictEqual(result.code, 125)
      assert.include(result.stderr, "(BOOT_IMAGE_NOT_FOUND)")
    })
  )

  it.live("wants a command", () =>
    Effect.gen(function* () {
      const { code, stderr } = yield* run([])
      assert.strictEqual(code, 125)
      assert.include(stderr, "PARSE_ARGUMENT_MISSING")
    })
  )
})

describe("usage", () => {
  for (const [args, exit, code] of [
    [["ls", "--no-such-flag"], 2, "PARSE_FLAG_UNKNOWN"],
    [["restore", "--name", "a", "--name", "b", "dir"], 2, "PARSE_FLAG_DUPLICATE"],
    [["restore", "--name"], 2, "PARSE_FLAG_MISSING_VALUE"],
    [["fork", "--count", "many", "web"], 2, "PARSE_FLAG_MALFORMED"],
    [["no-such-verb"], 2, "PARSE_COMMAND_UNKNOWN"],
    [["ls", "what"], 2, "PARSE_ARGUMENT_UNKNOWN"],
    [["run", "--image"], 125, "PARSE_FLAG_MISSING_VALUE"],
    [["run", "--image", "--name", "a", "--", "true"], 125, "PARSE_FLAG_MISSING_VALUE"],
    [["stop"], 2, "PARSE_ARGUMENT_MISSING"]
  ] as const) {
    it.live(`ends \`${args.join(" ")}\` with ${exit} and says why`, () =>
      Effect.gen(function* () {
        const result = yield* machinen(args)
        assert.deepStrictEqual({ code: result.code, stdout: result.stdout }, { code: exit, stdout: "" })
        assert.include(result.stderr, `(${code})`)
        assert.include(result.stderr, "hint:")
      })
    )
  }

  it.live("has completions, help and a version", () =>
    Effect.gen(function* () {
      for (const [args, text] of [
        [["--completions", "bash"], "complete -F _machinen_bash_completions"],
        [["--help"], "session-kill"],
        [["run", "--help"], "--mount-live"],
        [["--version"], "0.1.0"]
      ] as const) {
        const { code, stdout } = yield* machinen(args, { env: { MACHINEN_BOOT_TIMEOUT: "60" } })
        assert.strictEqual(code, 0)
        assert.include(stdout, text)
      }
      const unusable = yield* machinen(["ls"], { env: { MACHINEN_BOOT_TIMEOUT: "60" } })
      assert.deepStrictEqual([unusable.code, unusable.stdout], [2, ""])
      assert.include(unusable.stderr, "(PARSE_ENVIRONMENT_INVALID)")
    })
  )

  for (const args of [
    ["exec", "nobody", "--", "true"],
    ["stop", "nobody"],
    ["inspect", "nobody"],
    ["logs", "nobody"],
    ["watch", "nobody", "/srv"],
    ["cp", "nobody:/etc/passwd", home]
  ]) {
    it.live(`reports that there is no VM for \`${args.slice(0, 2).join(" ")}\``, () =>
      Effect.gen(function* () {
        const result = yield* machinen(args)
        assert.strictEqual(result.code, args[0] === "exec" ? 125 : 1)
        assert.include(result.stderr, "(REGISTRY_VM_NOT_FOUND)")
        assert.strictEqual(result.stdout, "")
      })
    )
  }
})

describe("a detached VM", () => {
  it.scopedLive(
    "is listed, inspected, entered and stopped",
    () =>
      Effect.gen(function* () {
        yield* detached("web")
        const listed = json((yield* machinen(["ls", "--json"])).stdout)
        assert.deepInclude(listed[0], {
          name: "web",
          state: "running",
          image: "micro",
          detached: true,
          memoryMib: 512,
          vcpus: 1
        })
        // the guest's memory and what runs it, apart
        const { guestResidentBytes, overheadBytes, rssBytes } = listed[0]
        assert.isTrue(guestResidentBytes > 2 ** 20 && guestResidentBytes < 512 * 2 ** 20, `${guestResidentBytes}`)
        assert.isTrue(overheadBytes > 2 ** 20 && guestResidentBytes + overheadBytes > rssBytes, `${overheadBytes}`)
        for (const verb of ["ls", "list", "ps"])
          assert.match((yield* machinen([verb])).stdout, /^web\s+[0-9a-f]{12}\s+\d+\s+running/m)

        const other = yield* machinen(["exec", "web", "--user", "1234:5678", "--", "sh", "-c", "id -u; id -g"])
        assert.deepStrictEqual(other, { code: 0, signal: null, stdout: "1234\n5678\n", stderr: "" })
        const nobody = yield* machinen(["exec", "web", "-u", "no-such-user", "--", "true"])
        assert.strictEqual(nobody.code, 125)
        assert.include(nobody.stderr, "no-such-user")

        const inspected = json((yield* machinen(["inspect", "--json", "web"])).stdout)
        assert.deepInclude(inspected, { name: "web", pid: listed[0]?.["pid"] })
        assert.isObject(inspected["guest"])

        const executed = yield* machinen([
          "exec",
          "web",
          "-e",
          "A=b",
          "-w",
          "/tmp",
          "--",
          "sh",
          "-c",
          "echo $A $PWD; echo err >&2; exit 5"
        ])
        const { code, stderr, stdout } = executed
        assert.deepStrictEqual({ code, stderr, stdout }, { code: 5, stderr: "err\n", stdout: "b /tmp\n" })
        const asJson = yield* machinen(["exec", "--json", "web", "--", "sh", "-c", "echo out; exit 6"])
        assert.strictEqual(asJson.code, 6)
        assert.deepInclude(json(asJson.stdout), {
          exitCode: 6,
          signal: null,
          oomKilled: false,
          stdout: "out\n",
          stderr: ""
        })
        assert.strictEqual(
          (yield* machinen(["exec", "-i", "web", "--", "cat"], { stdin: Buffer.from("typed") })).stdout,
          "typed"
        )
        assert.strictEqual((yield* machinen(["exec", "web", "--", "nothing"])).code, 127)
        assert.strictEqual((yield* machinen(["exec", "web", "-w", "/nowhere", "--", "true"])).code, 125)
        assert.strictEqual(
          (yield* machinen(["exec", String(listed[0]?.["pid"]), "--", "echo", "by pid"])).stdout,
          "by pid\n"
        )

        const taken = yield* run(["--name", "web", "--", "true"])
        assert.strictEqual(taken.code, 125)
        assert.include(taken.stderr, "(REGISTRY_NAME_IN_USE)")
        assert.strictEqual((yield* machinen(["exec", "web", "--", "echo", "still there"])).stdout, "still there\n")

        const stopped = yield* machinen(["stop", "--json", "web"])
        assert.strictEqual(stopped.code, 0)
        assert.deepInclude(json(stopped.stdout)["exit"], { orderly: true, reason: "stop" })
        assert.deepStrictEqual(json((yield* machinen(["ls", "--json"])).stdout), [])
      }),
    120_000
  )

  it.scopedLive("keeps what its command prints", () =>
    Effect.gen(function* () {
      yield* detached("logging", ["--", "sh", "-c", "echo first; echo second >&2; exec sleep 1000"])
      const following = yield* startCli(home, ["logs", "-f", "logging"])
      yield* following.printed("first")
      yield* following.printed("second")
      const { stdout } = yield* machinen(["logs", "logging"])
      assert.sameMembers(stdout.trim().split("\n"), ["first", "second"])
      assert.strictEqual((yield* machinen(["logs", "--console", "logging"])).code, 0)
      assert.strictEqual((yield* machinen(["stop", "logging"])).code, 0)
      assert.strictEqual((yield* following.result).code, 0)
    })
  )

  it.scopedLive("takes and gives files", () =>
    Effect.gen(function* () {
      yield* detached("copy")
      const source = path.join(home, "source")
      mkdirSync(path.join(source, "sub"), { recursive: true })
      writeFileSync(path.join(source, "sub", "file"), "contents\n")
      const copy = (from: string, to: string) =>
        Effect.map(machinen(["cp", from, to]), ({ code, stderr }) =>
          assert.deepStrictEqual({ code, stderr }, { code: 0, stderr: "" })
        )
      yield* copy(source, "copy:/srv/tree")
      yield* copy(path.join(source, "sub", "file"), "copy:/etc/")
      const { stdout } = yield* machinen(["exec", "copy", "--", "cat", "/srv/tree/sub/file", "/etc/file"])
      assert.strictEqual(stdout, "contents\ncontents\n")
      yield* copy("copy:/srv/tree", path.join(home, "back"))
      assert.strictEqual(readFileSync(path.join(home, "back", "sub", "file"), "utf8"), "contents\n")
      yield* copy("copy:/etc/file", home)
      assert.strictEqual(readFileSync(path.join(home, "file"), "utf8"), "contents\n")
      const missing = yield* machinen(["cp", "copy:/no/such/file", home])
      assert.strictEqual(missing.code, 1)
      assert.include(missing.stderr, "(FILES_NOT_FOUND)")
      assert.strictEqual((yield* machinen(["cp", source, home])).code, 2)
    })
  )

  it.scopedLive("is paused and resumed", () =>
    Effect.gen(function* () {
      yield* detached("napping")
      assert.strictEqual((yield* machinen(["pause", "napping"])).code, 0)
      const hung = yield* machinen(["exec", "--timeout", "300ms", "napping", "--", "true"])
      assert.strictEqual(hung.code, 124)
      assert.strictEqual((yield* machinen(["resume", "napping"])).code, 0)
      assert.strictEqual((yield* machinen(["exec", "napping", "--", "true"])).code, 0)
    })
  )

  it.live("prints JSON when booted with --json", () =>
    Effect.gen(function* () {
      const { stdout } = yield* machinen(["boot", "-d", "--json", "--image", "micro"])
      const booted = json(stdout)
      assert.match(String(booted["id"]), /^[a-f][0-9a-f]{11}$/)
      assert.isObject(booted["phasesMs"])
      assert.strictEqual((yield* machinen(["stop", String(booted["id"])])).code, 0)
    })
  )

  it.live("collects garbage, or says what it would", () =>
    Effect.gen(function* () {
      const collected = (...flags: ReadonlyArray<string>) =>
        Effect.map(collectGarbage(home, ...flags), ({ stdout }) => json(stdout))
      const dead = path.join(home, "vms", "a00000000001")
      mkdirSync(dead, { recursive: true })
      const found = [{ id: "a00000000001", removedPaths: [dead], failedPaths: [] }]
      assert.deepStrictEqual(yield* collected("--dry-run"), found)
      assert.isTrue(existsSync(dead))
      assert.deepStrictEqual(yield* collected(), found)
      assert.isFalse(existsSync(dead))
      assert.deepStrictEqual(yield* collected(), [])
    })
  )
})

it.live("needs no tools of the host but its own", () =>
  Effect.sync(() => {
    const stdout = execFileSync(process.execPath, [cliPath, "ls", "--json"], {
      env: environment(home),
      encoding: "utf8"
    })
    assert.deepStrictEqual(JSON.parse(stdout), [])
  })
)
