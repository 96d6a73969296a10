import { Effect, type Scope, Stream } from "effect"
import { Machinen } from "../../src/Machinen.ts"
import { HostProbe } from "../../src/machine/HostProbe.ts"
import { BenchError, type Failure, type Probe, type Scenario, type Variant } from "../harness.ts"
import * as tcp from "../tcpClient.ts"

const totalBytes = 500_000_000

/** Servers in the guest: one answers a byte with a byte, one sends, one reads to the end. */
const ports = { echo: 7001, source: 7002, sink: 7003 } as const
type Service = keyof typeof ports

const servers = `
import socket, threading
block = bytes(262144)
def echo(c):
    while piece := c.recv(65536): c.sendall(piece)
def source(c):
    left = ${totalBytes}
    while left: n = min(left, len(block)); c.sendall(memoryview(block)[:n]); left -= n
def sink(c):
    into = bytearray(262144)
    while c.recv_into(into): pass
def attend(serve, c):
    with c:
        try: serve(c)
        except OSError: pass
def listen(port, serve):
    s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(("0.0.0.0", port)); s.listen(64)
    while True: threading.Thread(target=attend, args=(serve, s.accept()[0]), daemon=True).start()
for port, serve in [(${ports.source}, source), (${ports.sink}, sink)]: threading.Thread(target=listen, args=(port, serve), daemon=True).start()
print("ready", flush=True)
listen(${ports.echo}, echo)
`

/** One way from the host to a server in the guest: ports of the host that are forwarded there. */
interface Transport {
  readonly name: string
  readonly ports: Readonly<Record<Service, number>>
}

const throughput = (probe: Probe, work: Effect.Effect<number, BenchError>) =>
  Effect.gen(function* () {
    const began = yield* probe.elapsed
    const bytes = yield* work
    if (bytes !== totalBytes)
      return yield* new BenchError({ message: `${bytes} bytes were carried, not ${totalBytes}` })
    yield* probe.record("throughput", bytes / 1000 / ((yield* probe.elapsed) - began), "MB/s")
  })

const variants = ({ name, ports }: Transport, runs: number): ReadonlyArray<Variant> => {
  const variant = (
    what: string,
    runs: number,
    run: (probe: Probe) => Effect.Effect<void, Failure, Scope.Scope>
  ): Variant => ({ name: `${name}: ${what}`, runs, released: false, run })
  return [
    variant("connect", runs * 20, ({ mark }) =>
      Effect.gen(function* () {
        const socket = yield* tcp.connect(ports.echo)
        yield* tcp.ping(socket)
        // waits for the first answer, which shows that the connection reaches the guest and not only the forwarder
        yield* mark("first byte back")
      })
    ),
    variant("round trip", runs * 20, ({ elapsed, record }) =>
      Effect.gen(function* () {
        const socket = yield* tcp.connect(ports.echo)
        yield* tcp.ping(socket)
        const began = yield* elapsed
        yield* tcp.ping(socket)
        yield* record("byte and back", (yield* elapsed) - began, "ms")
      })
    ),
    variant("out", runs, (probe) =>
      Effect.flatMap(tcp.connect(ports.source), (socket) => throughput(probe, tcp.drain(socket)))
    ),
    variant("in", runs, (probe) =>
      Effect.flatMap(tcp.connect(ports.sink), (socket) => throughput(probe, tcp.fill(socket, totalBytes)))
    )
  ]
}

export const network: Scenario = {
  name: "network",
  description: "TCP from the host to a server in the guest: how soon, how fast, by each way there is",
  setup: Effect.fn("network.setup")(function* ({ runs = 5 }) {
    const machinen = yield* Machinen
    const probe = yield* HostProbe
    const forwarded = { echo: yield* tcp.freePort, source: yield* tcp.freePort, sink: yield* tcp.freePort }
    const services: ReadonlyArray<Service> = ["echo", "source", "sink"]
    const { vm } = yield* machinen.boot({
      image: "debian",
      portForward: services.map((service) => ({ hostPort: forwarded[service], guestPort: ports[service] }))
    })
    const running = yield* vm.start({ argv: ["python3", "-c", servers] })
    yield* Stream.runHead(running.output)
    const [echo, source, sink] = yield* Effect.all([
      vm.tunnel({ guest: { port: ports.echo } }),
      vm.tunnel({ guest: { port: ports.source } }),
      vm.tunnel({ guest: { port: ports.sink } })
    ])
    const transports: ReadonlyArray<Transport> = [
      { name: "tunnel", ports: { echo: echo.hostPort, source: source.hostPort, sink: sink.hostPort } },
      { name: "gateway", ports: forwarded }
    ]
    return {
      warmup: 1,
      runs,
      variants: transports.flatMap((transport) => variants(transport, runs)),
      settings: { image: "debian", bytes: totalBytes, accelerator: yield* probe.accelerator },
      skipped: [],
      verdicts: () => []
    }
  })
}
