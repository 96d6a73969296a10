import { assert, describe, it } from "@effect/vitest"
import { Effect, Exit, FastCheck as fc, Schema } from "effect"
import packageJson from "../../../package.json" with { type: "json" }
import {
  BootError,
  ExecError,
  format,
  isMachinenError,
  MachinenError,
  RegistryError,
  render
} from "../../../src/errors.ts"
import { autoMemoryMib, type BootOptions, validate } from "../../../src/machine/BootOptions.ts"
import { VmName } from "../../../src/machine/MachineSpec.ts"
import { version } from "../../../src/version.ts"

const GiB = 1024 ** 3
const host = { memoryBytes: 8 * GiB, maxVcpus: 4 }

describe("boot options", () => {
  const refused: ReadonlyArray<readonly [what: string, options: BootOptions, code: string]> = [
    ["memory 0", { memoryMib: 0 }, "BOOT_MEMORY_INVALID"],
    ["memory 1", { memoryMib: 1 }, "BOOT_MEMORY_INVALID"],
    ["memory -5", { memoryMib: -5 }, "BOOT_MEMORY_INVALID"],
    ["memory 1e9", { memoryMib: 1e9 }, "BOOT_MEMORY_INVALID"],
    ["memory 1.5", { memoryMib: 128.5 }, "BOOT_MEMORY_INVALID"],
    ["memory NaN", { memoryMib: Number.NaN }, "BOOT_MEMORY_INVALID"],
    ["memory as text", { memoryMib: "lots" as never }, "BOOT_MEMORY_INVALID"],
    ["no vCPU", { vcpus: 0 }, "BOOT_VCPUS_INVALID"],
    ["too many vCPUs", { vcpus: 5 }, "BOOT_VCPUS_INVALID"],
    ["a relative directory", { cwd: "srv" }, "BOOT_CWD_INVALID"],
    ["a NUL in the directory", { cwd: "/a\0b" }, "BOOT_CWD_INVALID"],
    ["an empty command", { command: [] }, "BOOT_CMD_MISSING"],
    ["an empty command name", { command: [""] }, "BOOT_CMD_MISSING"],
    ["a NUL in the command", { command: ["echo", "a\0b"] }, "BOOT_OPTION_INVALID"],
    ["a NUL in the environment", { env: { A: "\0" } }, "BOOT_ENV_INVALID"],
    ["a variable without a name", { env: { "": "x" } }, "BOOT_ENV_INVALID"],
    [
      "2 MiB of environment",
      { env: Object.fromEntries([...Array(32)].map((_, i) => [`V${i}`, "x".repeat(65536)])) },
      "BOOT_ENV_INVALID"
    ],
    ["one huge variable", { env: { A: "x".repeat(200_000) } }, "BOOT_ENV_INVALID"],
    ["a disk of odd size", { rootDiskSizeBytes: GiB + 1 }, "BOOT_DISK_SIZE_INVALID"],
    ["a disk too small", { rootDiskSizeBytes: 4096 }, "BOOT_DISK_SIZE_INVALID"],
    ["image and root disk", { image: "micro", rootDisk: "/x" }, "BOOT_OPTION_INVALID"],
    ["a name with ..", { name: "a/../b" }, "REGISTRY_NAME_INVALID"],
    ["a name that is a pid", { name: "1234" }, "REGISTRY_NAME_INVALID"]
  ]
  for (const [what, options, code] of refused) {
    it.effect(`refuses ${what}`, () =>
      Effect.gen(function* () {
        const error = yield* Effect.flip(validate(options, host))
        assert.strictEqual(error.code, code)
        assert.isAbove(error.message.length, 10)
        assert.isString(error.hint)
      })
    )
  }

  it.effect("fills in defaults", () =>
    Effect.gen(function* () {
      const plan = yield* validate({}, host)
      assert.deepStrictEqual(plan, {
        image: "debian",
        rootDisk: undefined,
        command: undefined,
        env: {},
        cwd: undefined,
        makeCwd: false,
        user: undefined,
        name: undefined,
        memoryMib: 512,
        vcpus: 1,
        network: "nat",
        portForward: [],
        rootDiskSizeBytes: 2 * GiB,
        mounts: { mount: undefined, mountUpperBytes: 4 * GiB, liveMounts: [] },
        detached: false,
        prepared: true
      })
    })
  )

  it("auto memory is half of the host's, from 512 MiB to 16 GiB", () => {
    assert.deepStrictEqual(
      [0.5, 1, 3, 8, 64].map((gib) => autoMemoryMib(gib * GiB)),
      [512, 512, 1536, 4096, 16384]
    )
  })
})

describe("names", () => {
  it("path-like ones are fine, what a path or a pid could hide in is not", () => {
    const ok = Schema.is(VmName)
    for (const name of ["web", "team/job-1", "a.b_c~1", "1a"]) assert.isTrue(ok(name), name)
    for (const name of ["", "/a", "a//b", "a/", "..", "a/./b", "a b", "-x", "12", "a\0", "ä", "x".repeat(129)]) {
      assert.isFalse(ok(name), name)
    }
  })

  it("no accepted name leaves its directory when it becomes a file name", () => {
    fc.assert(
      fc.property(fc.string(), (name) => {
        if (!Schema.is(VmName)(name)) return
        const file = encodeURIComponent(name)
        assert.notInclude(file, "/")
        assert.notInclude([".", ".."], file)
      })
    )
  })
})

describe("errors", () => {
  it("survive JSON with code, hint and cause", () => {
    const error = new BootError({
      code: "BOOT_NO_SPACE",
      message: "full",
      hint: "free some",
      cause: new Error("ENOSPC")
    })
    const back = Schema.decodeSync(Schema.parseJson(MachinenError))(
      JSON.stringify(Schema.encodeSync(MachinenError)(error))
    )
    assert.isTrue(isMachinenError(back))
    assert.strictEqual(back.code, "BOOT_NO_SPACE")
    assert.strictEqual(back.message, "full")
    assert.strictEqual((back.cause as Error).message, "ENOSPC")
  })

  it("are retryable by code", () => {
    assert.isTrue(new ExecError({ code: "EXEC_AGENT_UNAVAILABLE", message: "" }).retryable)
    // it was under way: nobody knows what a second run would do
    assert.isFalse(new ExecError({ code: "EXEC_AGENT_TIMEOUT", message: "" }).retryable)
    assert.isFalse(new ExecError({ code: "EXEC_NONZERO_EXIT", message: "" }).retryable)
    assert.isFalse(new RegistryError({ code: "REGISTRY_NAME_IN_USE", message: "" }).retryable)
  })

  it("format as code, message and the whole chain of causes", () => {
    const cause = new Error("middle", { cause: "bottom" })
    const error = new BootError({
      code: "BOOT_VMM_FAILED",
      message: "top",
      hint: "do this",
      console: "one\ntwo\n",
      cause
    })
    assert.strictEqual(format(error), "(BOOT_VMM_FAILED): top\n  caused by: middle\n  caused by: bottom")
    assert.include(render(error), "    two")
    assert.include(render(error), "hint: do this")
  })

  it("are not confused with others", () => {
    assert.isFalse(isMachinenError(new Error("x")))
    assert.isFalse(isMachinenError({ code: "BOOT_NO_SPACE" }))
    assert.isTrue(Exit.isFailure(Effect.runSyncExit(new BootError({ code: "BOOT_NO_SPACE", message: "x" }))))
  })
})

it("the version is package.json's", () => {
  assert.strictEqual(version, packageJson.version)
})
