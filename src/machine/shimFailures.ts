import { Data } from "effect"
import { BootError } from "../errors.ts"
import type { ShimEvent, ShimPlan } from "./ShimPlan.ts"

export const shimMissing = (binary: string, cause: unknown) =>
  new BootError({
    code: "BOOT_VMM_MISSING",
    message: `the shim cannot be run: ${binary}`,
    hint: "run `machinen install` (in a checkout: `npm run setup`)",
    cause
  })

export const startFailed = (event: Extract<ShimEvent, { event: "failed" }>, plan: ShimPlan) => {
  const [vmm] = plan.vmm.argv
  if (event.code === "ENOSPC") {
    return new BootError({
      code: "BOOT_NO_SPACE",
      message: `no space left on the host for the VM's files: ${event.message}`,
      hint: `free some space on the disk that holds ${plan.dir}, or set MACHINEN_HOME to a larger one`
    })
  }
  if (event.step === "network") return forwardFailed(event)
  if (event.step === "shares") return sharesFailed(event, plan)
  if (event.step === "vmm" && (event.code === "ENOENT" || event.code === "EACCES")) {
    return new BootError({
      code: "BOOT_VMM_MISSING",
      message: `the VMM cannot be run: ${vmm}: ${event.message}`,
      hint: "run `machinen doctor` to see what is missing"
    })
  }
  return new BootError({
    code: "BOOT_VMM_FAILED",
    message: `the VM could not be started (${event.step}): ${event.message}`
  })
}

/** The subject of failures of the server itself (native/shim/src/shares.rs); others are about what it is to serve. */
const shareServer = "machinen-share"

const sharesFailed = ({ code, message, subject }: Extract<ShimEvent, { event: "failed" }>, { shares }: ShimPlan) => {
  if (subject !== shareServer) {
    return new BootError({
      code: code === "ENOENT" ? "BOOT_MOUNT_HOST_NOT_FOUND" : "BOOT_MOUNT_INVALID",
      message: `a live mount cannot be served: ${message}`,
      hint:
        code === "EACCES" || code === "EPERM"
          ? "give a directory or a file that this user may use"
          : "give an existing directory or file of the host"
    })
  }
  const [program] = shares?.argv ?? [shareServer]
  return code === "ENOENT" || code === "EACCES"
    ? new BootError({
        code: "BOOT_VMM_MISSING",
        message: `the server of live mounts cannot be run: ${program}: ${message}`,
        hint: "run `machinen install` (in a checkout: `npm run setup`)"
      })
    : new BootError({
        code: "BOOT_VMM_FAILED",
        message: `the server of live mounts could not be started: ${message}`,
        hint: "run `machinen doctor` to see what is missing"
      })
}

/** The cause of BOOT_PORT_FORWARD_IN_USE: the host's socket (`ip:port`) that another process holds. */
export class HostSocketTaken extends Data.TaggedError("HostSocketTaken")<{
  readonly message: string
  readonly hostSocket: string
}> {}

const forwardFailed = ({ code, message, subject }: Extract<ShimEvent, { event: "failed" }>) => {
  if (code === "EADDRINUSE") {
    return new BootError({
      code: "BOOT_PORT_FORWARD_IN_USE",
      message: `the host's port ${subject} is taken`,
      hint: "choose another port; `ss -ltnp` tells who listens there",
      cause: new HostSocketTaken({ message, hostSocket: subject })
    })
  }
  return new BootError({
    code: "BOOT_PORT_FORWARD_INVALID",
    message: `nothing can listen on ${message}`,
    hint:
      code === "EACCES"
        ? "ports below 1024 are for root; choose a higher one"
        : "give an address of this host: `ip address` lists them"
  })
}
