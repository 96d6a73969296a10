import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import * as path from "node:path"
import { Effect } from "effect"

export const write = (root: string, file: string, text: string) => {
  mkdirSync(path.join(root, path.dirname(file)), { recursive: true })
  writeFileSync(path.join(root, file), text)
}

/** A directory of the test's own, gone with its scope. */
export const temporaryDirectory = Effect.acquireRelease(
  Effect.sync(() => mkdtempSync(path.join(tmpdir(), "machinen-test-"))),
  (dir) => Effect.sync(() => rmSync(dir, { recursive: true, force: true }))
)

/** The least that has every input of every asset. */
export const writeSourceTree = (root: string) => {
  const files = [
    "kernel/build.sh",
    "kernel/config",
    "kernel/patches/0001-a.patch",
    ".cargo/config.toml",
    "Cargo.lock",
    "Cargo.toml",
    "guest/src/main.rs",
    "native/shim/src/main.rs",
    "native/share/src/main.rs",
    "gvproxy/main.go",
    "bases/ext4.sh",
    "bases/micro.sh",
    "bases/debian.sh",
    "bases/debian-finish.sh",
    "bases/debian.packages"
  ]
  for (const file of files) write(root, file, `contents of ${file}\n`)
}
