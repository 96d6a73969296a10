import { FileSystem } from "@effect/platform"
import { Context, Effect, Layer, Option } from "effect"
import { GvproxyError } from "../errors.ts"
import { Assets } from "../host/Assets.ts"
import { guestNetwork } from "../machine/Network.ts"
import { Settings } from "../Settings.ts"

/**
 * gvproxy, which serves a guest's network card. The VM's shim starts it when the guest first sends a frame or a client comes to a forwarded port,
 * and again when it ends (docs/protocol.md §5.1).
 */
export class Gvproxy extends Context.Tag("machinen/Gvproxy")<
  Gvproxy,
  {
    /** The command line. Fails with GVPROXY_NOT_FOUND when the program is missing. */
    readonly command: Effect.Effect<readonly [string, ...ReadonlyArray<string>], GvproxyError>
  }
>() {
  static readonly layer = Layer.effect(
    Gvproxy,
    Effect.gen(function* () {
      const fs = yield* FileSystem.FileSystem
      const assets = yield* Assets
      const settings = yield* Settings
      const program = Option.match(settings.gvproxy, {
        onNone: () => Effect.mapError(assets.gvproxy, notBuilt),
        onSome: (chosen) =>
          fs.stat(chosen).pipe(
            Effect.filterOrFail(({ mode, type }) => type === "File" && (mode & 0o111) !== 0),
            Effect.mapBoth({ onFailure: () => notThere(chosen), onSuccess: () => chosen })
          )
      })
      return Gvproxy.of({
        command: Effect.map(program, (path) => [path, "-mtu", String(guestNetwork.mtu)] as const)
      })
    })
  )
}

const notBuilt = (cause: Error) =>
  new GvproxyError({
    code: "GVPROXY_NOT_FOUND",
    message: `the guest's network needs gvproxy, which is not built: ${cause.message}`,
    hint: "run `machinen install` (in a checkout: `npm run setup`), or boot without a network (`--network none`)",
    cause
  })

const notThere = (path: string) =>
  new GvproxyError({
    code: "GVPROXY_NOT_FOUND",
    message: `MACHINEN_GVPROXY is ${path}, which is no program`,
    hint: "correct it, or unset it for the one that set-up builds"
  })
