import { assert, it } from "@effect/vitest"
import packageJson from "../../package.json" with { type: "json" }
import { version } from "../../src/version.ts"

it("the version is package.json's", () => {
  assert.strictEqual(version, packageJson.version)
})
