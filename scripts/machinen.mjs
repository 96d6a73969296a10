// The CLI in a checkout: bundled again when a source is newer than the bundle, then run in this very process.
import { spawnSync } from "node:child_process"
import { existsSync, readdirSync, statSync } from "node:fs"
import { dirname, join } from "node:path"
import { fileURLToPath } from "node:url"

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const bundle = join(root, "dist", "cli.js")

const newest = ["src", "backends", "package-lock.json", "tsdown.config.ts"]
  .flatMap((entry) => {
    const path = join(root, entry)
    if (!statSync(path).isDirectory()) return [path]
    return readdirSync(path, { recursive: true, encoding: "utf8" }).map((file) => join(path, file))
  })
  .reduce((latest, file) => Math.max(latest, statSync(file).mtimeMs), 0)

if (!existsSync(bundle) || statSync(bundle).mtimeMs < newest) {
  const built = spawnSync(join(root, "node_modules", ".bin", "tsdown"), ["--log-level", "warn"], {
    cwd: root,
    encoding: "utf8"
  })
  if (built.status !== 0) {
    process.stderr.write(`cannot bundle the CLI\n${built.stdout}${built.stderr}${built.error ?? ""}\n`)
    process.exit(70)
  }
}
await import(bundle)
