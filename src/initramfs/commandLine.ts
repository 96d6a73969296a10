import { parseArgs } from "node:util"
import { FileSystem } from "@effect/platform"
import { Effect } from "effect"
import { ParseError } from "../errors.ts"
import { given } from "../platform/given.ts"
import { parseExcludes } from "./archive.ts"
import { bundle, minimal, rootfs, tinyBundle, workspace } from "./packers.ts"

const flags = {
  bundle: { type: "string" },
  rootfs: { type: "string" },
  workspace: { type: "string" },
  tiny: { type: "boolean" },
  base: { type: "string" },
  excludes: { type: "string" },
  config: { type: "string" },
  init: { type: "string" },
  "exec-agent": { type: "string" },
  "mount-guest": { type: "string" },
  mountpoint: { type: "string" },
  "max-mb": { type: "string" },
  out: { type: "string" }
} as const

const usage =
  "--out FILE and one of --bundle DIR [--tiny] [--base TAR], --rootfs DIR [--config FILE], --workspace DIR [--mountpoint NAME], or none of them; --excludes FILE, --init FILE"

/** Runs a packer by command-line arguments. Without a source this is `minimal`. Fails with MkinitramfsError or AssetError. */
export const cli = Effect.fn("InitramfsPackers.cli")(function* (argv: ReadonlyArray<string>) {
  const fs = yield* FileSystem.FileSystem
  const { values } = yield* Effect.try({
    try: () => parseArgs({ args: [...argv], options: flags, strict: true }),
    catch: (cause) =>
      new ParseError({
        code: /unknown option/i.test(String(cause)) ? "PARSE_FLAG_UNKNOWN" : "PARSE_FLAG_MALFORMED",
        message: cause instanceof Error ? (cause.message.split("\n", 1)[0] ?? "") : String(cause),
        hint: usage
      })
  })
  const sources = [values.bundle, values.rootfs, values.workspace].filter((source) => source !== undefined)
  if (values.out === undefined || sources.length > 1) {
    return yield* new ParseError({
      code: values.out === undefined ? "PARSE_FLAG_MISSING_VALUE" : "PARSE_FLAG_MALFORMED",
      message: values.out === undefined ? "--out is missing" : "more than one source was given",
      hint: usage
    })
  }
  const maxMb = values["max-mb"] === undefined ? undefined : Number(values["max-mb"])
  if (maxMb !== undefined && !(maxMb > 0)) {
    return yield* new ParseError({ code: "PARSE_FLAG_MALFORMED", message: "--max-mb is not a number", hint: usage })
  }
  const patterns =
    values.excludes === undefined
      ? undefined
      : parseExcludes(
          yield* Effect.mapError(
            fs.readFileString(values.excludes),
            (cause) =>
              new ParseError({ code: "PARSE_FLAG_MALFORMED", message: `--excludes: ${cause.message}`, hint: usage })
          )
        )
  const common = given({ out: values.out, initPath: values.init, excludes: patterns })
  const { out } = values
  if (values.workspace !== undefined) {
    return yield* workspace(
      given({ out, workspace: values.workspace, mountpoint: values.mountpoint, excludes: patterns, maxMb })
    )
  }
  if (values.rootfs !== undefined)
    return yield* rootfs(given({ ...common, out, rootfs: values.rootfs, config: values.config }))
  if (values.bundle === undefined) return yield* minimal(given({ out, initPath: values.init, config: values.config }))
  if (values.tiny === true) {
    return yield* tinyBundle(
      given({ out, bundle: values.bundle, initPath: values.init, mountGuest: values["mount-guest"] })
    )
  }
  return yield* bundle(
    given({ ...common, out, bundle: values.bundle, base: values.base, execAgentPath: values["exec-agent"] })
  )
})
