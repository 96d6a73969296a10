import * as path from "node:path"
import { afterEach, assert, layer } from "@effect/vitest"
import { Effect } from "effect"
import { ImageStore } from "../../src/image/ImageStore.ts"
import { Machinen } from "../../src/Machinen.ts"
import { assertNothingLeft, live, settled, temporaryDirectory, temporaryHome, text } from "../fixtures.ts"

const home = temporaryHome()
afterEach(() => settled(home))
const cache = { MACHINEN_CACHE_DIR: temporaryDirectory() }

/** Over the guest's own network, from the mirror of the image's apt sources: this test needs that mirror to be reachable. */
layer(live(home, cache), { excludeTestServices: true })("a package from Debian's mirror", (it) => {
  it.effect(
    "is installed by a build, and there in the image it makes",
    () =>
      Effect.gen(function* () {
        const machinen = yield* Machinen
        const out = path.join(temporaryDirectory(), "jq.tar.gz")
        yield* machinen.provision({
          out,
          config: { cmd: ["jq", "--null-input", "6 * 7"] },
          install: (vm) =>
            vm
              // only the main list: the others would double the time of this test
              .exec(
                "sed -i '/-updates\\|-security/d' /etc/apt/sources.list && apt-get update && apt-get install -y --no-install-recommends jq && apt-get clean"
              )
              .pipe(Effect.asVoid)
        })
        const { vm } = yield* machinen.boot({ image: out, network: "none" })
        const { stdout } = yield* vm.exec(["jq", "--null-input", "6 * 7"].map((word) => `'${word}'`).join(" "))
        assert.strictEqual(text(stdout), "42\n")
        yield* vm.stop()
        const store = yield* ImageStore
        const [image] = yield* store.list
        const { config, packages } = yield* store.inspect(image?.id ?? "")
        assert.deepStrictEqual(config.cmd, ["jq", "--null-input", "6 * 7"])
        assert.match(packages["jq"] ?? "", /^1\.6/)
        assertNothingLeft(home)
      }).pipe(Effect.scoped),
    240_000
  )
})
