import { assert, describe, it } from "@effect/vitest"
import { Schema } from "effect"
import { TemplateShape } from "../../../src/boot/Template.ts"

const base = { path: "/assets/base.ext4", sizeBytes: 1, changedNs: "2", inode: 3, device: 4 }
const machine = {
  backend: "qemu",
  vmmVersion: "7.2",
  machine: "microvm",
  accel: "tcg",
  cpu: "max",
  devices: ["a", "b"]
} as const
const shape = {
  recipe: 1,
  kernel: "/assets/kernel-1/vmlinux",
  init: "/assets/programs-1/init",
  kernelArguments: "quiet",
  base,
  rootDiskSizeBytes: 2 ** 31,
  memoryMib: 512,
  vcpus: 1,
  network: "nat",
  machine
} as const

type Fields = ConstructorParameters<typeof TemplateShape>[0]
const keyOf = (fields: Fields) => new TemplateShape(fields).key

/** Each differs from the shape in one thing. */
const others: ReadonlyArray<Partial<Fields>> = [
  { kernel: "/assets/kernel-2/vmlinux" },
  { init: "/assets/programs-2/init" },
  { kernelArguments: "quiet acpi=off" },
  { base: { ...base, path: "/assets/other.ext4" } },
  { base: { ...base, sizeBytes: 2 } },
  { base: { ...base, changedNs: "3" } },
  { base: { ...base, inode: 4 } },
  { base: { ...base, device: 5 } },
  { rootDiskSizeBytes: 2 ** 30 },
  { memoryMib: 256 },
  { vcpus: 2 },
  { network: "none" },
  { machine: { ...machine, backend: "other" } },
  { machine: { ...machine, vmmVersion: "8.0" } },
  { machine: { ...machine, machine: "q35" } },
  { machine: { ...machine, accel: "kvm" } },
  { machine: { ...machine, cpu: "host" } },
  { machine: { ...machine, devices: ["b", "a"] } }
]

describe("the key of a template", () => {
  it("is a directory's name, and the same for the same machine", () => {
    assert.match(keyOf(shape), /^[0-9a-f]{32}$/)
    assert.strictEqual(keyOf({ ...shape, base: { ...base }, machine: { ...machine } }), keyOf(shape))
  })

  it("is another one when anything that decides the machine is", () => {
    const keys = [shape, ...others.map((other) => ({ ...shape, ...other }))].map(keyOf)
    assert.strictEqual(new Set(keys).size, keys.length)
  })

  it("survives being written down", () => {
    const Json = Schema.parseJson(TemplateShape)
    const read = Schema.decodeSync(Json)(Schema.encodeSync(Json)(new TemplateShape(shape)))
    assert.strictEqual(read.key, keyOf(shape))
  })
})
