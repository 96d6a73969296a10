import { Command } from "@effect/cli"
import { Console, Effect } from "effect"
import { Machinen } from "../../Machinen.ts"
import { bootOptions, json, toMachineOptions } from "../options.ts"
import * as render from "../render.ts"

const { disk, image, memory, network, vcpus } = bootOptions

/** `machinen prepare`: makes a template, so that boots of the same shape start from it instead of a kernel. */
export const prepare = Command.make("prepare", { image, memory, vcpus, disk, network, json }, (input) =>
  Effect.gen(function* () {
    const machinen = yield* Machinen
    const { dataBytes, dir, made } = yield* machinen.prepare(yield* toMachineOptions(input))
    if (input.json) return yield* render.json({ dir, dataBytes, made })
    yield* Console.log(`${made ? "prepared" : "there already"}: ${dir} (${render.bytes(dataBytes)})`)
  })
).pipe(Command.withDescription("have boots of this shape begin as a machine that has booted"))
