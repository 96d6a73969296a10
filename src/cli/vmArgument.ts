import { Args } from "@effect/cli"
import { Effect } from "effect"
import { Machinen } from "../Machinen.ts"

/** The VM that a verb is about. */
export const vmArg = Args.text({ name: "vm" }).pipe(Args.withDescription("a VM's name, id or pid"))

/** The running VM that the argument names. */
export const attached = (vm: string) => Effect.flatMap(Machinen, ({ attach }) => attach(vm))
