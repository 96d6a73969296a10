import { isIP } from "node:net"

/** Whether a text is an IPv4 or IPv6 address. An IPv6 address may name a zone, such as `fe80::1%eth0`. */
export const isIpAddress = (text: string): boolean => isIP(text) !== 0
