import { Command, Options } from "@effect/cli"
import { FileSystem } from "@effect/platform"
import { Console, Effect, Stream } from "effect"
import { Machinen } from "../../Machinen.ts"
import { bytes } from "../render.ts"
import * as stdio from "../stdio.ts"
import { setUp } from "./install.ts"

const reportScript = `
import collections, os, platform
kinds = collections.Counter(os.path.splitext(f)[1] or "(none)" for _, _, fs in os.walk("/srv/work") for f in fs)
print("  guest:", platform.platform(), "python", platform.python_version())
print("  files by kind:", ", ".join(f"{k} {n}" for k, n in kinds.most_common(4)))
open("/srv/work/REPORT", "w").write(repr(kinds))
`

/** `machinen demo`: runs set-up, then shows the main uses on a Debian guest: boot, copy files in, work, copy files out, fork two siblings. */
export const demo = Command.make(
  "demo",
  { image: Options.text("image").pipe(Options.withDefault("debian")) },
  ({ image }) =>
    Effect.gen(function* () {
      yield* setUp
      const machinen = yield* Machinen
      const fs = yield* FileSystem.FileSystem
      const since = performance.now()
      const took = () => `${Math.round(performance.now() - since)} ms`
      const say = (text: string) => Console.log(`[${took().padStart(8)}] ${text}`)

      yield* say(`boot: a ${image} guest`)
      yield* Effect.scoped(
        Effect.gen(function* () {
          const { vm } = yield* machinen.boot({ image })
          yield* say(`up: id ${vm.id}, pid ${vm.pid}, ${vm.entry.accel}`)

          const source = yield* fs.makeTempDirectoryScoped({ prefix: "machinen-demo-" })
          yield* fs.writeFileString(
            `${source}/hello.py`,
            "print('hello from', open('/etc/os-release').readline().strip())\n"
          )
          yield* fs.writeFileString(`${source}/data.csv`, "a,b\n1,2\n")
          yield* vm.push(source, "/srv/work")
          yield* say("pushed a directory to /srv/work")

          const work =
            image === "debian" ? ["python3", "-c", reportScript] : ["sh", "-c", "ls /srv/work | tee /srv/work/REPORT"]
          const [first = "true", ...rest] = work
          const running = yield* vm.start({ argv: [first, ...rest] })
          yield* Stream.runForEach(running.output, ({ bytes, channel }) => stdio.write(channel)(bytes))
          const { code } = yield* running.exit
          yield* say(`worked in it: exit code ${code}`)

          const report = yield* vm.readFile("/srv/work/REPORT").pipe(Stream.decodeText(), Stream.mkString)
          yield* say(`read its report back: ${report.trim().slice(0, 60)}`)

          yield* vm.exec("echo 'a thought, in memory only' > /dev/shm/thought")
          const { pausedMs, siblings } = yield* machinen.fork(vm, { count: 2 })
          yield* say(`forked into ${siblings.length} siblings; it stood still for ${Math.round(pausedMs)} ms`)
          for (const [i, sibling] of siblings.entries()) {
            const { stdout } = yield* sibling.vm.exec(
              `echo 'and one of number ${i + 1}' >> /dev/shm/thought; paste -s -d, /dev/shm/thought || cat /dev/shm/thought`
            )
            yield* say(`${sibling.vm.id} remembers: ${Buffer.from(stdout).toString().trim()}`)
          }
          const own = yield* vm.readFile("/dev/shm/thought").pipe(Stream.decodeText(), Stream.mkString)
          yield* say(`the original still has only: ${own.trim()}`)
          const { hostRssBytes } = yield* vm.memoryStats
          yield* say(`memory on the host: ${bytes(hostRssBytes ?? 0)} of at most ${vm.entry.memoryMib} MiB`)
        })
      )
      const left = (yield* machinen.list).length
      yield* say(`gone: ${left === 0 ? "nothing is left behind" : `${left} other VMs run on`}`)
    })
).pipe(Command.withDescription("set up this host and show the main job on a real guest"))
