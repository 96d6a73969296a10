import { Command, Options } from "@effect/cli"
import { Console, Duration, Effect } from "effect"
import { type Progress, Setup, type SetupOptions } from "../../host/Setup.ts"
import { baseNames } from "../../image/RootfsImage.ts"
import { Machinen } from "../../Machinen.ts"
import { HostProbe } from "../../machine/HostProbe.ts"
import { Settings } from "../../Settings.ts"
import { whenGiven } from "../options.ts"
import * as render from "../render.ts"

/** Shows progress on stderr, because stdout is for the results of commands. */
const show = (event: Progress): Effect.Effect<void> => {
  switch (event._tag) {
    case "Skipped":
      return Console.error(`✔ ${event.title} (there already)`)
    case "Started":
      return Console.error(`… ${event.title}`)
    case "Line":
      return Console.error(`  [${event.step}] ${event.line}`)
    case "Done":
      return Console.error(
        `✔ ${event.title} (${Duration.format(Duration.millis(Math.round(Duration.toMillis(event.elapsed))))})`
      )
    case "Failed":
      return Console.error(`✘ ${event.title}: ${event.error.message}`)
  }
}

/** Makes templates of the bases, so that their boots need no kernel. A failure is no failure of set-up: boots then use a kernel. */
const prepareBases = Effect.gen(function* () {
  const machinen = yield* Machinen
  const { prepared } = yield* Settings
  if (prepared === "off") return
  for (const image of baseNames) {
    const title = `prepared machine ${image}`
    yield* Effect.timed(machinen.prepare({ image })).pipe(
      Effect.flatMap(([elapsed, { dataBytes, made }]) =>
        Console.error(
          made
            ? `✔ ${title} (${Duration.format(Duration.millis(Math.round(Duration.toMillis(elapsed))))}, ${render.bytes(dataBytes)})`
            : `✔ ${title} (there already)`
        )
      ),
      Effect.catchAll((error) => Console.error(`✘ ${title}: ${error.message}; its boots will take a kernel`))
    )
  }
})

/** Sets this host up for VMs and shows the progress. Ends with a probe of the accelerator. */
const setUpWith = Effect.fnUntraced(function* (options: SetupOptions) {
  const setup = yield* Setup
  const probe = yield* HostProbe
  const [elapsed] = yield* Effect.timed(
    Effect.gen(function* () {
      yield* setup.run(show, options)
      const { accel, reason } = yield* probe.accelerator
      yield* Console.error(`✔ accelerator: ${accel} (${reason})`)
      yield* prepareBases
    })
  )
  yield* Console.error(`set-up took ${(Duration.toMillis(elapsed) / 1000).toFixed(1)} s`)
})

export const setUp = setUpWith({})

/** `machinen install` (`npm run setup`): may be run at any time, and continues after a failure. */
export const install = Command.make(
  "install",
  {
    from: Options.text("from").pipe(
      Options.optional,
      Options.withDescription("take what is there from another host's asset store, a directory or a web server")
    ),
    verify: Options.boolean("verify").pipe(
      Options.withDescription("read all of what is there, and build again what is damaged")
    ),
    withTests: Options.boolean("with-tests").pipe(
      Options.withDescription("install what the tests and benches of a checkout need, too")
    )
  },
  ({ from, verify, withTests }) => setUpWith({ verify, withTests, ...whenGiven({ from }) })
).pipe(Command.withDescription("build and install what VMs need on this host"))
