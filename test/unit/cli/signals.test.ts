import { assert, it } from "@effect/vitest"
import { Effect, Stream } from "effect"
import { relay } from "../../../src/cli/commands/run.ts"
import * as signals from "../../../src/cli/signals.ts"
import { ExitStatus } from "../../../src/machine/MachineSpec.ts"

it.effect("signals go to a guest's command until it ends, and end us afterwards", () =>
  Effect.gen(function* () {
    const [ours, theirs]: [Array<string>, Array<number>] = [[], []]
    signals.install((signal) => ours.push(signal))
    const interrupt = Effect.sync(() => void process.emit("SIGTERM"))
    const command = {
      pid: 7,
      output: Stream.execute(interrupt),
      exit: Effect.succeed(new ExitStatus({ code: 3, signal: null, oomKilled: false })),
      signal: (signal: number) => Effect.sync(() => void theirs.push(signal))
    }
    assert.strictEqual(yield* relay(command), 3)
    assert.deepStrictEqual([ours, theirs], [[], [15]])
    yield* interrupt
    assert.deepStrictEqual([ours, theirs], [["SIGTERM"], [15]])
  })
)
