import * as path from "node:path"
import { Args, Command, Options } from "@effect/cli"
import { FileSystem } from "@effect/platform"
import { Effect } from "effect"
import { ParseError } from "../../domain/errors.ts"
import { Machinen } from "../../Machinen.ts"
import type { Vm } from "../../Vm.ts"

const place = (name: string) =>
  Args.text({ name }).pipe(Args.withDescription("VM:/path in a guest, or a path on the host"))

/** `vm:/path`; a host path with a colon is written with a slash before it (`./a:b`), as for docker cp. */
const parse = (text: string): { readonly vm: string; readonly path: string } | { readonly path: string } => {
  const colon = text.indexOf(":")
  const slash = text.indexOf("/")
  return colon > 0 && (slash === -1 || colon < slash || text.charAt(colon + 1) === "/") && !/^[./]/.test(text)
    ? { vm: text.slice(0, colon), path: text.slice(colon + 1) }
    : { path: text }
}

/** Copying into an existing directory means below it, under the source's name, as cp does. */
const toGuest = Effect.fnUntraced(function* (vm: Vm, source: string, target: string, excludes: ReadonlyArray<string>) {
  const fs = yield* FileSystem.FileSystem
  const guest = yield* Effect.option(vm.stat(target === "" ? "/" : target))
  const intoDirectory = target.endsWith("/") || (guest._tag === "Some" && guest.value.kind === "directory")
  const info = yield* Effect.option(fs.stat(source))
  const contentsOnly =
    source.endsWith("/.") || (info._tag === "Some" && info.value.type === "Directory" && guest._tag === "None")
  const to = intoDirectory && !contentsOnly ? path.posix.join(target, path.basename(path.resolve(source))) : target
  yield* vm.push(path.resolve(source), path.posix.normalize(to), { excludes })
})

const toHost = Effect.fnUntraced(function* (vm: Vm, source: string, target: string, excludes: ReadonlyArray<string>) {
  const fs = yield* FileSystem.FileSystem
  const host = yield* Effect.option(fs.stat(target))
  const intoDirectory = host._tag === "Some" && host.value.type === "Directory" && !source.endsWith("/.")
  yield* vm.pull(
    path.posix.normalize(source),
    path.resolve(intoDirectory ? path.join(target, path.posix.basename(source)) : target),
    { excludes }
  )
})

const exclude = Options.text("exclude").pipe(
  Options.repeated,
  Options.withDescription("a pattern for paths below a directory, or for any name; may be repeated")
)

/** `machinen cp VM:/path HOST` and back. */
export const cp = Command.make("cp", { exclude, from: place("from"), to: place("to") }, (input) =>
  Effect.gen(function* () {
    const machinen = yield* Machinen
    const from = parse(input.from)
    const to = parse(input.to)
    if ("vm" in from && !("vm" in to))
      return yield* toHost(yield* machinen.attach(from.vm), from.path, to.path, input.exclude)
    if ("vm" in to && !("vm" in from))
      return yield* toGuest(yield* machinen.attach(to.vm), from.path, to.path, input.exclude)
    return yield* new ParseError({
      code: "PARSE_FLAG_MALFORMED",
      message: "one of the two places is in a VM, the other on the host",
      hint: "machinen cp ./src web:/srv, or machinen cp web:/var/log/x.log ."
    })
  })
).pipe(Command.withDescription("copy files between the host and a VM"))
