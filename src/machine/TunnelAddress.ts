import { Effect } from "effect"
import { ParseError } from "../errors.ts"
import { isIpAddress } from "../platform/ipAddress.ts"

/** A listener in a guest: a TCP port of its loopback interface, or a unix socket. */
export type TunnelTarget = { readonly port: number } | { readonly path: string }

/** A port of the host that is forwarded to a listener in a guest. */
export interface TunnelMapping {
  /** Default 127.0.0.1, which other hosts cannot reach. */
  readonly hostAddress?: string
  /** Default 0: a free port. */
  readonly hostPort?: number
  readonly guest: TunnelTarget
}

/** Formats a target: a port, or `unix:/path`. */
export const showTarget = (target: TunnelTarget): string =>
  "port" in target ? String(target.port) : `unix:${target.path}`

/** Formats an address of the host; an IPv6 address is in brackets. */
export const showAddress = (address: string, port: number): string =>
  address.includes(":") ? `[${address}]:${port}` : `${address}:${port}`

/**
 * Parses `[[ADDRESS:]PORT:]GUEST`. GUEST is a port (also `80/tcp`) or `unix:/path`; an IPv6 address is in brackets. Without PORT: a free port.
 * Fails with ParseError.
 */
export const parseMapping = (text: string): Effect.Effect<TunnelMapping, ParseError> => {
  const refuse = (why: string) =>
    new ParseError({
      code: "PARSE_PORT_INVALID",
      message: `${JSON.stringify(text.slice(0, 200))}: ${why}`,
      hint: "8080:80, 0.0.0.0:8080:80, [::1]:8080:80, 8080:unix:/run/app.sock, or 80 for any free port of the host"
    })
  const port = (digits: string): number | undefined => {
    const number = /^[0-9]{1,5}$/.test(digits) ? Number(digits) : 0
    return number >= 1 && number <= 65535 ? number : undefined
  }
  const notPort = (digits: string) =>
    refuse(
      /^[0-9]+-[0-9]+$/.test(digits)
        ? `a range of ports (${digits}) cannot be given; give each port`
        : `${JSON.stringify(digits)} is not a port from 1 to 65535`
    )

  const [, host, unix, guestDigits = ""] = /^(?:(.*?):)??(?:unix:(.*)|([^:]*))$/s.exec(text) ?? []
  const [, digits = guestDigits, protocol] = /^(.*)\/([a-z]+)$/is.exec(guestDigits) ?? []
  if (protocol !== undefined && protocol.toLowerCase() !== "tcp") {
    return refuse(`only TCP is led into a guest, not ${protocol}`)
  }
  if (unix !== undefined && (!unix.startsWith("/") || unix.includes("\0"))) {
    return refuse("the guest's socket is not an absolute path")
  }
  const guestPort = port(digits)
  if (unix === undefined && guestPort === undefined) return notPort(digits)
  const guest: TunnelTarget = unix === undefined ? { port: guestPort ?? 0 } : { path: unix }
  if (host === undefined) return Effect.succeed({ guest })

  const [, bracketed, plain, hostDigits = ""] = /^(?:\[([^\]]*)\]:|(.*):)?([^:]*)$/s.exec(host) ?? []
  const hostPort = port(hostDigits)
  if (hostPort === undefined) return notPort(hostDigits)
  if (plain?.includes(":") === true) return refuse("an IPv6 address stands in brackets")
  const hostAddress = bracketed ?? plain
  if (hostAddress === undefined) return Effect.succeed({ hostPort, guest })
  if (bracketed === undefined ? !/^[\w.-]+$/.test(hostAddress) : !isIpAddress(hostAddress)) {
    return refuse(`${JSON.stringify(hostAddress)} is not an address of this host`)
  }
  return Effect.succeed({ hostAddress: hostAddress === "localhost" ? "127.0.0.1" : hostAddress, hostPort, guest })
}
