import { randomBytes } from "node:crypto"
import * as path from "node:path"
import { Effect } from "effect"
import { BootError } from "../errors.ts"
import { VmId } from "../machine/MachineSpec.ts"
import { Vmm } from "../machine/Vmm.ts"
import { given } from "../platform/given.ts"
import * as processes from "../platform/processes.ts"
import * as UnixSocket from "../platform/UnixSocket.ts"
import { Settings } from "../Settings.ts"

/**
 * Chooses a new VM's id and directory, and makes nothing. `entry` holds the fields of the VM's entry that a boot and a restore have in common.
 */
export const newVm = Effect.gen(function* () {
  const settings = yield* Settings
  const vmm = yield* Vmm
  const { accel, backend } = yield* vmm.capabilities
  const id = newId()
  const dir = path.join(settings.vmsDir, id)
  const vsockPath = path.join(dir, "vsock.sock")
  yield* checkSocketPath(`${vsockPath}_65535`, settings.home)
  return {
    id,
    dir,
    entry: {
      version: 1 as const,
      id,
      state: "booting" as const,
      bootId: yield* processes.bootId,
      owner: yield* processes.self,
      // False until the VM is ready: a start that is interrupted or killed must not leave a VM without an owner, or a frozen copy.
      detached: false,
      backend,
      accel,
      createdAt: Date.now(),
      vsockPath,
      controlPath: path.join(dir, "shim.sock"),
      ...given({ vmmControlPath: vmm.controlPath(dir) })
    }
  }
})

/** Makes an id whose first digit is a letter, because digits alone would be taken for a pid. */
const newId = () => {
  const hex = randomBytes(6).toString("hex")
  return VmId.make("abcdef".charAt(Number.parseInt(hex.charAt(0), 16) % 6) + hex.slice(1))
}

const checkSocketPath = (longest: string, home: string) =>
  Buffer.byteLength(longest) <= UnixSocket.maxPath
    ? Effect.void
    : new BootError({
        code: "BOOT_STATE_DIR_UNUSABLE",
        message: `the state directory's path is too long for unix sockets (${Buffer.byteLength(longest)} of ${UnixSocket.maxPath} bytes): ${home}`,
        hint: "set MACHINEN_HOME to a shorter path"
      })
