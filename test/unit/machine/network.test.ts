import { assert, describe, it } from "@effect/vitest"
import { Effect, FastCheck as fc } from "effect"
import { portForward } from "../../../src/cli/options.ts"
import { VmId } from "../../../src/machine/MachineSpec.ts"
import { hostSocket, macOf, type PortForwardOption, validateForwards } from "../../../src/machine/Network.ts"

const forward = (hostPort: number, guestPort = 80, hostAddr?: string): PortForwardOption => ({
  hostPort,
  guestPort,
  ...(hostAddr === undefined ? {} : { hostAddr })
})

describe("port forwards", () => {
  it.effect("are on 127.0.0.1 unless they say otherwise", () =>
    Effect.gen(function* () {
      const all = yield* validateForwards("nat", [
        forward(8080),
        forward(8080, 80, "::1"),
        forward(8081, 80, "10.0.0.7")
      ])
      assert.deepStrictEqual(all.map(hostSocket), ["127.0.0.1:8080", "[::1]:8080", "10.0.0.7:8081"])
    })
  )

  it.effect.each<[string, string, ReadonlyArray<PortForwardOption>]>([
    ["port 0", "BOOT_PORT_FORWARD_INVALID", [forward(0)]],
    ["port 70000", "BOOT_PORT_FORWARD_INVALID", [forward(8080, 70000)]],
    ["half a port", "BOOT_PORT_FORWARD_INVALID", [forward(80.5)]],
    ["a name for an address", "BOOT_PORT_FORWARD_INVALID", [forward(8080, 80, "localhost")]],
    ["no address", "BOOT_PORT_FORWARD_INVALID", [forward(8080, 80, "")]],
    ["an address with a part too many", "BOOT_PORT_FORWARD_INVALID", [forward(8080, 80, "127.0.0.1.1")]],
    ["an address with a part too large", "BOOT_PORT_FORWARD_INVALID", [forward(8080, 80, "127.0.0.256")]],
    ["half an IPv6 address", "BOOT_PORT_FORWARD_INVALID", [forward(8080, 80, "::1::")]],
    ["an address with a port in brackets", "BOOT_PORT_FORWARD_INVALID", [forward(8080, 80, "::1]:80/[")]],
    ["an address with a zone", "BOOT_PORT_FORWARD_INVALID", [forward(8080, 80, "fe80::1%eth0")]],
    ["the same port twice", "BOOT_PORT_FORWARD_CONFLICT", [forward(8080), forward(8080, 81)]],
    ["a port of all addresses and of one", "BOOT_PORT_FORWARD_CONFLICT", [forward(8080, 80, "0.0.0.0"), forward(8080)]],
    ["too many", "BOOT_PORT_FORWARD_INVALID", Array.from({ length: 129 }, (_, i) => forward(1000 + i))]
  ])("refuses %s", ([, code, forwards]) =>
    Effect.gen(function* () {
      const error = yield* Effect.flip(validateForwards("nat", forwards))
      assert.strictEqual(error.code, code)
      assert.isDefined(error.hint)
    })
  )

  it.effect("need a network", () =>
    Effect.gen(function* () {
      assert.deepStrictEqual(yield* validateForwards("none", []), [])
      const error = yield* Effect.flip(validateForwards("none", [forward(8080)]))
      assert.strictEqual(error.code, "BOOT_PORT_FORWARD_INVALID")
    })
  )

  it.effect("are read from the command line", () =>
    Effect.gen(function* () {
      assert.deepStrictEqual(yield* portForward(["8080:80", "0.0.0.0:53:5353", "[::1]:1:2"]), [
        { hostPort: 8080, guestPort: 80 },
        { hostAddr: "0.0.0.0", hostPort: 53, guestPort: 5353 },
        { hostAddr: "::1", hostPort: 1, guestPort: 2 }
      ])
      for (const wrong of [
        "",
        "80",
        "0:80",
        "8080:70000",
        "-1:80",
        ":80",
        "80:",
        "a:b",
        "::1:80:80",
        "1:2:3:4",
        "80:80/udp",
        "[]:1:2",
        "8080:unix:/run/app",
        " 80:80"
      ]) {
        assert.strictEqual((yield* Effect.flip(portForward([wrong]))).code, "PARSE_PORT_INVALID", wrong)
      }
    })
  )
})

describe("hardware addresses", () => {
  it("are unicast, locally administered, and one for each VM", () => {
    const id = fc.stringMatching(/^[a-f][0-9a-f]{11}$/).map((text) => VmId.make(text))
    fc.assert(
      fc.property(id, (id) => {
        const mac = macOf(id)
        assert.match(mac, /^([0-9a-f]{2}:){5}[0-9a-f]{2}$/)
        assert.strictEqual(Number.parseInt(mac.slice(0, 2), 16) & 3, 2)
        assert.strictEqual(mac.replaceAll(":", "").slice(2), id.slice(2))
      })
    )
  })
})
