import { Effect, Schema } from "effect"
import { BootError } from "../errors.ts"
import { isIpAddress } from "../platform/ipAddress.ts"
import type { VmId } from "./MachineSpec.ts"
import { showAddress } from "./TunnelAddress.ts"

/** `nat`: a network card behind a gateway of the VM's own (gvproxy), which reaches what the host reaches. `none`: no network card. */
export const NetworkMode = Schema.Literal("nat", "none")
export type NetworkMode = typeof NetworkMode.Type

export const defaultNetwork: NetworkMode = "nat"

/** Forwards TCP connections from an address and port of the host to a port of the guest. */
export const PortForward = Schema.Struct({
  hostAddr: Schema.String,
  hostPort: Schema.Int,
  guestPort: Schema.Int
})
export type PortForward = typeof PortForward.Type

/** A forward in the options. By default only programs on this host can reach it. */
export interface PortForwardOption {
  readonly hostPort: number
  readonly guestPort: number
  /** An IPv4 or IPv6 address of this host. Default 127.0.0.1. */
  readonly hostAddr?: string
}

/**
 * The guest's side of its network; `gvproxy/main.go` is the other side. All guests have the same addresses, because each has a gateway of its own.
 * In the guest, `host.machinen.internal` is the host's 127.0.0.1. The MTU concerns guest and gateway only, because TCP ends at the gateway. The
 * guest runs code for each packet, so a large MTU pays: with 1500 bytes a forwarded download has 87 MB/s instead of 290 (measured, TCG).
 */
export const guestNetwork = {
  address: "192.168.127.2",
  prefixLength: 24,
  gateway: "192.168.127.1",
  nameserver: "192.168.127.1",
  mtu: 65520
} as const

/** A VM's hardware address, derived from its id: locally administered, unicast (IEEE 802, the two low bits of the first octet). */
export const macOf = (id: VmId): string => {
  const octets = [...Buffer.from(id, "hex")]
  const first = ((octets[0] ?? 0) & 0xfc) | 0x02
  return [first, ...octets.slice(1)].map((octet) => octet.toString(16).padStart(2, "0")).join(":")
}

export const hostSocket = ({ hostAddr, hostPort }: PortForward): string => showAddress(hostAddr, hostPort)

const maxForwards = 128

/** Checks forwards without touching the host: the shim finds out whether a port is free. Fails with the first BOOT_PORT_FORWARD_* error. */
export const validateForwards = Effect.fnUntraced(function* (
  network: NetworkMode,
  asked: ReadonlyArray<PortForwardOption>
) {
  const forwards = asked.map(
    ({ guestPort, hostAddr = "127.0.0.1", hostPort }): PortForward => ({
      hostAddr,
      hostPort,
      guestPort
    })
  )
  if (network === "none" && forwards.length > 0) {
    return yield* invalid(
      "a VM without a network has no ports to forward to",
      "leave out `network: none`, or use a tunnel"
    )
  }
  if (forwards.length > maxForwards) {
    return yield* invalid(`${forwards.length} ports are too many to forward`, `${maxForwards} can be`)
  }
  for (const [i, forward] of forwards.entries()) {
    for (const port of [forward.hostPort, forward.guestPort]) {
      if (!Number.isSafeInteger(port) || port < 1 || port > 65535) {
        return yield* invalid(`${port} is no port`, "a port is a whole number from 1 to 65535")
      }
    }
    if (!isAddress(forward.hostAddr)) {
      return yield* invalid(
        `${JSON.stringify(forward.hostAddr.slice(0, 80))} is no IP address`,
        "give an address of this host, like 127.0.0.1, 0.0.0.0 or ::1"
      )
    }
    if (forwards.slice(0, i).some((other) => clash(other, forward))) {
      return yield* new BootError({
        code: "BOOT_PORT_FORWARD_CONFLICT",
        message: `the host's port ${hostSocket(forward)} is forwarded twice`,
        hint: "give each forward a host port of its own"
      })
    }
  }
  return forwards
})

/** The shim takes no zone in an address. */
const isAddress = (text: string) => isIpAddress(text) && !text.includes("%")

const clash = (a: PortForward, b: PortForward) =>
  a.hostPort === b.hostPort && (a.hostAddr === b.hostAddr || [a, b].some(({ hostAddr }) => /^[0:.]+$/.test(hostAddr)))

const invalid = (message: string, hint: string) => new BootError({ code: "BOOT_PORT_FORWARD_INVALID", message, hint })
