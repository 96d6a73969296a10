import { assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import { autoMemoryMib, type BootOptions, validate } from "../../../src/machine/BootOptions.ts"

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
