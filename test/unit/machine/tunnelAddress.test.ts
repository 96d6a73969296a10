import { assert, describe, it } from "@effect/vitest"
import { Effect } from "effect"
import { parseMapping, type TunnelMapping } from "../../../src/machine/TunnelAddress.ts"

describe("tunnel mappings", () => {
  const good: ReadonlyArray<readonly [text: string, mapping: TunnelMapping]> = [
    ["80", { guest: { port: 80 } }],
    ["8080:80", { hostPort: 8080, guest: { port: 80 } }],
    ["0.0.0.0:8080:80", { hostAddress: "0.0.0.0", hostPort: 8080, guest: { port: 80 } }],
    ["localhost:8080:80", { hostAddress: "127.0.0.1", hostPort: 8080, guest: { port: 80 } }],
    ["80/tcp", { guest: { port: 80 } }],
    ["8080:80/tcp", { hostPort: 8080, guest: { port: 80 } }],
    ["[::1]:8080:80", { hostAddress: "::1", hostPort: 8080, guest: { port: 80 } }],
    ["unix:/run/a.sock", { guest: { path: "/run/a.sock" } }],
    ["8080:unix:/run/a:80", { hostPort: 8080, guest: { path: "/run/a:80" } }],
    ["[fe80::1%eth0]:1:unix:/a", { hostAddress: "fe80::1%eth0", hostPort: 1, guest: { path: "/a" } }]
  ]
  for (const [text, mapping] of good) {
    it.effect(`reads ${text}`, () =>
      Effect.gen(function* () {
        assert.deepStrictEqual(yield* parseMapping(text), mapping)
      })
    )
  }

  const bad = ["", ":", "0", "0:80", "80:0", "70000:80", "80:70000", "-1:80", "80:x", "80:8e1", "a:b:c", "::1:8080:80"]
  const worse = [
    "[::1]:80",
    "[]:80:80",
    "[1::g]:80:80",
    "[1:2]:80:80",
    "a b:80:80",
    ":80",
    ":8080:80",
    "80:unix:",
    "80:unix:run",
    "80:"
  ]
  for (const [text, why] of [
    ["53/udp", "only TCP is led into a guest, not udp"],
    ["53:53/udp", "only TCP is led into a guest, not udp"],
    ["8080-8090:80-90", "a range of ports (80-90) cannot be given"],
    ["8080-8090:80", "a range of ports (8080-8090) cannot be given"]
  ] as const) {
    it.effect(`says of ${text} what is not there`, () =>
      Effect.gen(function* () {
        assert.include((yield* Effect.flip(parseMapping(text))).message, why)
      })
    )
  }
  for (const text of [...bad, ...worse, "unix:/a\0", "80:80:80:80"]) {
    it.effect(`refuses ${JSON.stringify(text)}`, () =>
      Effect.gen(function* () {
        assert.strictEqual((yield* Effect.flip(parseMapping(text))).code, "PARSE_PORT_INVALID")
      })
    )
  }
})
