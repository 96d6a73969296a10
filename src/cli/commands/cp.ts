import * as path from "node:path"
import { Args, Command, Options } from "@effect/cli"
import { FileSystem } from "@effect/platform"
import { Effect, Option } from "effect"
import { FilesError, ParseError } from "../../errors.ts"
import { Machinen } from "../../Machinen.ts"
import { given } from "../../platform/given.ts"
import type { Vm } from "../../vm/Vm.ts"

const place = (name: string) =>
  Args.text({ name }).pipe(Args.withDescription("VM:/path in a guest, or a path on the host"))

/** Parses `vm:/path` or a host path. A host path with a colon needs a slash before it (`./a:b`), as in docker cp. */
const parse = Effect.fnUntraced(function* (text: string) {
  if (text === "-") {
    return yield* new ParseError({
      code: "PARSE_FLAG_MALFORMED",
      message: "- is no file: cp does not read or write streams",
      hint: "machinen exec web -- cat /file >file, or ./- for a file of that name"
    })
  }
  const colon = text.indexOf(":")
  const slash = text.indexOf("/")
  const isGuest = colon > 0 && (slash === -1 || colon < slash || text.charAt(colon + 1) === "/") && !/^[./]/.test(text)
  if (!isGuest) return { path: text }
  const [vm, inGuest] = [text.slice(0, colon), text.slice(colon + 1)]
  if (!inGuest.startsWith("/")) {
    return yield* new ParseError({
      code: "PARSE_FLAG_MALFORMED",
      message: `${text}: a path in a VM begins with a slash`,
      hint: `${vm}:/${inGuest}, or ./${text} for a file of the host`
    })
  }
  return { vm, path: inGuest }
})

interface Source {
  readonly isDirectory: boolean
  /** The name that the copy gets in a directory; `undefined`: the source's contents go there. */
  readonly name: string | undefined
}

/** One side of the copy: the host or a guest. */
interface Side {
  readonly paths: path.PlatformPath
  /** The kind of file at a path, if there is one; with `follow` of what a link leads to. */
  readonly kind: (place: string, follow: boolean) => Effect.Effect<Option.Option<string>, FilesError>
}

const refused = (message: string, hint?: string) =>
  new FilesError({ code: "FILES_PATH_INVALID", message, ...given({ hint }) })

/** The path of the copy, by the rules of `cp -R` and `docker cp`. Fails with FILES_PATH_INVALID. */
const destination = Effect.fnUntraced(function* ({ kind, paths }: Side, target: string, source: Source) {
  const there = Option.getOrUndefined(yield* kind(target, true))
  if (there === "directory") {
    if (source.name === undefined) return target
    const below = paths.join(target, source.name)
    const taken = source.isDirectory ? Option.getOrElse(yield* kind(below, false), () => "directory") : "directory"
    return taken === "directory" ? below : yield* refused(`${below} is there and is no directory`)
  }
  if (there !== undefined) {
    return source.isDirectory || target.endsWith("/") ? yield* refused(`${target} is no directory`) : target
  }
  if (Option.isSome(yield* kind(target, false))) return yield* refused(`${target} is a link that leads nowhere`)
  const parent = source.isDirectory || !target.endsWith("/") ? paths.dirname(target) : target
  if (Option.getOrUndefined(yield* kind(parent, true)) !== "directory") {
    return yield* refused(`there is no directory ${parent}`, "make it first (mkdir -p)")
  }
  return target
})

/** Whether the source ends with a slash or `/.`, so that a directory is meant: a link then stands for what it leads to. */
const meansDirectory = (source: string) => /(^|\/)\.?$/.test(source)
const meansContents = (source: string) => /(^|\/)\.$/.test(source)

interface Flags {
  readonly excludes: ReadonlyArray<string>
  readonly follow: boolean
}

const guestSide = (vm: Vm): Side => ({
  paths: path.posix,
  kind: (place, follow) =>
    vm.stat(place, { follow }).pipe(
      Effect.map(({ kind }) => Option.some(kind)),
      Effect.catchIf(
        ({ code }) => code === "FILES_NOT_FOUND",
        () => Effect.succeedNone
      )
    )
})

const hostSide = Effect.map(
  FileSystem.FileSystem,
  (fs): Side => ({
    paths: path,
    kind: (place, follow) =>
      Effect.gen(function* () {
        if (!follow && Option.isSome(yield* Effect.option(fs.readLink(place)))) return Option.some("symlink")
        return Option.map(yield* Effect.option(fs.stat(place)), ({ type }) => type.toLowerCase())
      })
  })
)

const toGuest = Effect.fnUntraced(function* (vm: Vm, from: string, to: string, flags: Flags) {
  const [host, guest] = [yield* hostSide, guestSide(vm)]
  const follow = flags.follow || meansDirectory(from)
  const kind = yield* host.kind(from, follow)
  const source = path.resolve(from)
  const name = meansContents(from) ? undefined : path.basename(source)
  // the copy itself reports a missing source
  const target = Option.isNone(kind)
    ? to
    : yield* destination(guest, to, { isDirectory: kind.value === "directory", name })
  yield* vm.push(source, path.posix.normalize(target), { ...flags, follow })
})

const toHost = Effect.fnUntraced(function* (vm: Vm, from: string, to: string, flags: Flags & { maxBytes?: number }) {
  const [host, guest] = [yield* hostSide, guestSide(vm)]
  const follow = flags.follow || meansDirectory(from)
  const kind = yield* guest.kind(from, follow)
  const source = path.posix.normalize(from)
  const name = meansContents(from) ? undefined : path.posix.basename(source) || undefined
  const target = Option.isNone(kind)
    ? to
    : yield* destination(host, to, { isDirectory: kind.value === "directory", name })
  yield* vm.pull(source, path.resolve(target), { ...flags, follow })
})

const exclude = Options.text("exclude").pipe(
  Options.repeated,
  Options.withDescription("a pattern for paths below a directory, or for any name; may be repeated")
)

const followLink = Options.boolean("follow-link", { aliases: ["L"] }).pipe(
  Options.withDescription("copy what a link leads to when the source is one; else the link itself")
)

const maxBytes = Options.integer("max-bytes").pipe(
  Options.optional,
  Options.withDescription("most that a guest may send")
)

/** `machinen cp VM:/path HOST`, `machinen cp HOST VM:/path`: copies files and trees. */
export const cp = Command.make("cp", { exclude, followLink, maxBytes, from: place("from"), to: place("to") }, (input) =>
  Effect.gen(function* () {
    const machinen = yield* Machinen
    const from = yield* parse(input.from)
    const to = yield* parse(input.to)
    const flags = { excludes: input.exclude, follow: input.followLink }
    if ("vm" in from && !("vm" in to)) {
      const limit = Option.match(input.maxBytes, { onNone: () => ({}), onSome: (maxBytes) => ({ maxBytes }) })
      return yield* toHost(yield* machinen.attach(from.vm), from.path, to.path, { ...flags, ...limit })
    }
    if ("vm" in to && !("vm" in from)) return yield* toGuest(yield* machinen.attach(to.vm), from.path, to.path, flags)
    return yield* new ParseError({
      code: "PARSE_FLAG_MALFORMED",
      message: "one of the two places is in a VM, the other on the host",
      hint: "machinen cp ./src web:/srv, or machinen cp web:/var/log/x.log ."
    })
  })
).pipe(Command.withDescription("copy files between the host and a VM"))
