import * as Args from "@effect/cli/Args"
import * as Command from "@effect/cli/Command"
import * as Options from "@effect/cli/Options"
import * as NodeContext from "@effect/platform-node/NodeContext"
import * as NodeRuntime from "@effect/platform-node/NodeRuntime"
import { Console, Effect, Option } from "effect"
import { Settings } from "../src/Settings.ts"
import { version } from "../src/version.ts"
import { live, temporaryHome } from "../test/host.ts"
import { measure, type Scenario } from "./harness.ts"
import * as leakCheck from "./leakCheck.ts"
import * as report from "./report.ts"
import { cli } from "./scenarios/cli.ts"
import { clones } from "./scenarios/clones.ts"
import { coldBoot } from "./scenarios/coldBoot.ts"
import { copy } from "./scenarios/copy.ts"
import { criu } from "./scenarios/criu.ts"
import { exec } from "./scenarios/exec.ts"
import { fork } from "./scenarios/fork.ts"
import { images } from "./scenarios/images.ts"
import { mounts } from "./scenarios/mounts.ts"
import { network } from "./scenarios/network.ts"
import { restore } from "./scenarios/restore.ts"
import { snapshot } from "./scenarios/snapshot.ts"
import { terminal } from "./scenarios/terminal.ts"

const scenarios: ReadonlyArray<Scenario> = [
  coldBoot,
  exec,
  cli,
  restore,
  snapshot,
  fork,
  clones,
  criu,
  images,
  mounts,
  terminal,
  copy,
  network
]

interface Choice {
  readonly runs: number | undefined
  readonly images: ReadonlyArray<"micro" | "debian">
  readonly json: boolean
}

const runScenario = Effect.fn("bench")(function* (scenario: Scenario, { images, json, runs }: Choice) {
  const { home } = yield* Settings
  const finish = yield* report.begin
  yield* Console.error(`${scenario.name}: set-up`)
  const measured = yield* Effect.scoped(
    Effect.gen(function* () {
      const prepared = yield* scenario.setup({ images, runs })
      return { prepared, results: yield* measure(scenario.name, prepared) }
    })
  )
  const leaks = yield* leakCheck.leaks(home)
  const finished = finish(scenario.name, measured.prepared, measured.results, leaks)
  const file = yield* report.save(finished)
  yield* Console.log(json ? JSON.stringify(finished) : report.text(finished))
  yield* Console.error(`all samples: ${file}`)
  // last, so that the figures can be read even when the check fails; they do not count then
  yield* leakCheck.check(home)
})

const list = Console.log(scenarios.map(({ description, name }) => `${name.padEnd(12)}${description}`).join("\n"))

const bench = Command.make(
  "bench",
  {
    scenario: Args.choice(
      scenarios.map((scenario) => [scenario.name, scenario] as const),
      { name: "scenario" }
    ).pipe(Args.optional),
    runs: Options.integer("runs").pipe(
      Options.filterMap((n) => (n > 0 ? Option.some(n) : Option.none()), "give 1 or more"),
      Options.withDescription("samples of each variant"),
      Options.optional
    ),
    image: Options.choice("image", ["micro", "debian"]).pipe(
      Options.withDescription("only this image"),
      Options.optional
    ),
    json: Options.boolean("json").pipe(Options.withDescription("the report as JSON instead of a table"))
  },
  ({ image, json, runs, scenario }) =>
    Option.match(scenario, {
      onNone: () => list,
      onSome: (chosen) =>
        runScenario(chosen, {
          json,
          runs: Option.getOrUndefined(runs),
          images: Option.match(image, { onNone: () => ["micro", "debian"] as const, onSome: (one) => [one] })
        }).pipe(Effect.provide(live(temporaryHome())))
    })
).pipe(Command.withDescription("measures machinen on this host; without a scenario, lists them"))

Command.run(bench, { name: "bench", version })(process.argv).pipe(
  Effect.provide(NodeContext.layer),
  NodeRuntime.runMain
)
