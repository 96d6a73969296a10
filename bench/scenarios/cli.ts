import { Effect } from "effect"
import { HostProbe } from "../../src/machine/HostProbe.ts"
import * as command from "../../src/platform/command.ts"
import { Settings } from "../../src/Settings.ts"
import { environment } from "../../test/host.ts"
import { bundle } from "../bundle.ts"
import { atMost, BenchError, p50, type Scenario, type Variant } from "../harness.ts"

/** Wall time of a program from spawn to the end of its output. Its stdin is a pipe that stays open, as in many scripts. */
const wall = (
  name: string,
  argv: readonly [string, ...ReadonlyArray<string>],
  home: string,
  runs?: number
): Variant => ({
  name,
  ...(runs === undefined ? {} : { runs }),
  released: false,
  run: ({ mark }) =>
    Effect.gen(function* () {
      const { code, stderr } = yield* command.run(argv, environment(home)).pipe(
        Effect.timeoutFail({
          duration: "60 seconds",
          onTimeout: () => new BenchError({ message: `${name} has not ended within a minute` })
        })
      )
      yield* mark("wall")
      if (code !== 0) return yield* new BenchError({ message: `${name} ended with code ${code}: ${stderr.trim()}` })
    })
})

export const cli: Scenario = {
  name: "cli",
  description: "whole commands as a shell sees them, beside Node doing nothing",
  setup: Effect.fn("cli.setup")(function* ({ images, runs = 20 }) {
    const { home } = yield* Settings
    const probe = yield* HostProbe
    const image = images[0] ?? "micro"
    const cliPath = yield* bundle
    const node = process.execPath
    return {
      warmup: 2,
      runs,
      variants: [
        wall("node -e 0", [node, "-e", "0"], home),
        wall("ls", [node, cliPath, "ls"], home),
        wall(
          `run --image ${image} -- true`,
          [node, cliPath, "run", "--image", image, "--", "true"],
          home,
          Math.min(runs, 10)
        )
      ],
      settings: { image, accelerator: yield* probe.accelerator },
      skipped: [],
      verdicts: (results) => [atMost("ls (median)", "ms", p50(results, "ls", "wall"), 250)]
    }
  })
}
