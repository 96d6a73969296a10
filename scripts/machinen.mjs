// The CLI in a checkout: bundles the sources again when one is newer than the bundle, then runs the bundle in this process. Start it as
// `node -- scripts/machinen.mjs`: without `--` Node would take the CLI's --env-file for its own option.
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
// npm runs scripts in the package's directory and tells where it was called: relative paths are relative to that. A program that npm's script
// has started inherits these variables and has a directory of its own.
const { INIT_CWD, npm_lifecycle_script: script = "" } = process.env
if (INIT_CWD !== undefined && process.cwd() === root && /^node -- scripts\/machinen\.mjs/.test(script))
  process.chdir(INIT_CWD)

await import(bundle)
