import { randomBytes } from "node:crypto"
import * as path from "node:path"
import { FileSystem, type Error as PlatformErrors } from "@effect/platform"
import { Context, Effect, identity, Layer, Option, Schema, type Scope } from "effect"
import { RegistryError } from "../errors.ts"
import { given } from "../platform/given.ts"
import * as HostLock from "../platform/HostLock.ts"
import type { ProcessIdentity } from "../platform/ProcessIdentity.ts"
import * as processes from "../platform/processes.ts"
import { Settings } from "../Settings.ts"
import { VmId, type VmName } from "./MachineSpec.ts"
import { VmEntry } from "./VmEntry.ts"

/** What a dead VM, or the dead process that was starting it, left behind, and what became of it. */
export interface Leftover {
  readonly id: string
  readonly name?: string
  /** Paths that were removed; in a dry run those that would be. */
  readonly removedPaths: ReadonlyArray<string>
  readonly failedPaths: ReadonlyArray<string>
}

/**
 * The VMs of this user on this host: a directory for each below `vmsDir`, a pin file for each name below `namesDir`. The registry does not end
 * VMs; it removes what dead ones left. An entry counts only while the process that it names (pid, start time, host boot) is alive.
 */
export class Registry extends Context.Tag("machinen/Registry")<
  Registry,
  {
    /**
     * Creates the VM's directory and takes its name. Closing the scope removes both, unless a shim has taken the VM over and is alive. Returns paths
     * that the shim must remove before the entry: otherwise it could remove a pin that another VM has taken meanwhile. Fails with
     * REGISTRY_NAME_IN_USE, REGISTRY_IO.
     */
    readonly claim: (entry: VmEntry) => Effect.Effect<ReadonlyArray<string>, RegistryError, Scope.Scope>
    /**
     * Gives a VM without a name the first of `candidates` that is free; `None` when none is. `rename` tells the shim before the pin is made, so that
     * the shim removes the pin with the VM.
     */
    readonly assign: <E>(
      id: VmId,
      candidates: ReadonlyArray<VmName>,
      rename: (name: VmName | null, pin: string | null) => Effect.Effect<void, E>
    ) => Effect.Effect<Option.Option<VmName>, RegistryError | E>
    /** A directory that is removed with the scope; if this process is killed, the next command removes it (`reconcile`). */
    readonly scratch: Effect.Effect<string, RegistryError, Scope.Scope>
    /** Live VMs, oldest first. */
    readonly list: Effect.Effect<ReadonlyArray<VmEntry>, RegistryError>
    /** A live VM by pid (digits), name, id or unambiguous beginning of an id (4 characters or more). Fails with REGISTRY_VM_NOT_FOUND. */
    readonly find: (reference: string) => Effect.Effect<VmEntry, RegistryError>
    /** Removes what dead VMs and dead starters left; with `dryRun` only lists it. */
    readonly reconcile: (options?: {
      readonly dryRun?: boolean
    }) => Effect.Effect<ReadonlyArray<Leftover>, RegistryError>
  }
>() {
  static readonly layer = Layer.effect(
    Registry,
    Effect.gen(function* () {
      const fs = yield* FileSystem.FileSystem
      const { namesDir, vmsDir } = yield* Settings
      const bootId = yield* processes.bootId
      const me = yield* processes.self

      const dirOf = (id: string) => path.join(vmsDir, id)
      const pinOf = (name: string) => path.join(namesDir, encodeURIComponent(name))

      /** An entry that cannot be read or parsed counts as absent: nothing may be done because of it. */
      const readEntry = (id: string) =>
        fs.readFileString(path.join(dirOf(id), "entry.json")).pipe(
          Effect.flatMap(Schema.decode(Schema.parseJson(VmEntry))),
          Effect.filterOrFail((entry) => entry.id === id),
          Effect.option
        )

      const isLive = (entry: VmEntry) =>
        entry.bootId === bootId ? processes.isAlive(entry.shim ?? entry.owner) : Effect.succeed(false)

      const readLive = (id: string) => Effect.flatMap(readEntry(id), filterEffect(isLive))

      const readPin = (name: string) =>
        fs.readFileString(pinOf(name)).pipe(
          Effect.map((id) => id.trim()),
          Effect.option
        )

      const holder = (name: string) =>
        readPin(name).pipe(
          Effect.flatMap(Option.match({ onNone: () => Effect.succeedNone, onSome: readLive })),
          Effect.map(Option.filter((entry) => entry.name === name))
        )

      const checkName = Effect.fnUntraced(function* (name: VmName) {
        const held = yield* holder(name)
        if (Option.isSome(held)) return yield* nameInUse(name, held.value)
      })

      /** Makes a pin. link(2) is the atomic step: of several processes one succeeds. */
      const link = (from: string, to: string) =>
        fs.link(from, to).pipe(Effect.as(true), fallbackWhen("AlreadyExists", false))

      const takeName = Effect.fnUntraced(function* (name: VmName, id: VmId) {
        yield* fs.makeDirectory(namesDir, { recursive: true, mode: 0o700 })
        const mine = path.join(dirOf(id), "pin")
        yield* fs.writeFileString(mine, id)
        if (yield* link(mine, pinOf(name))) return
        // A stale pin is replaced under the lock only: of two processes that find it stale, the slower one would remove the other's new pin.
        yield* HostLock.withLock(
          `${namesDir}.lock`,
          identity
        )(
          Effect.gen(function* () {
            yield* checkName(name)
            yield* fs.remove(pinOf(name), { force: true })
            if (!(yield* link(mine, pinOf(name)))) yield* checkName(name)
          })
        )
      })

      /** Removes a pin if it holds this id. Under the lock, because a new owner could take the name between the check and the removal. */
      const dropName = (name: string, id: string) =>
        Effect.flatMap(readPin(name), (held) =>
          Option.contains(held, id) ? fs.remove(pinOf(name), { force: true }) : Effect.void
        ).pipe(HostLock.withLock(`${namesDir}.lock`, identity), Effect.ignore)

      /** Makes the directory by rename, so that it appears complete: a directory without an entry is a leftover, never a VM being started. */
      const createDir = Effect.fnUntraced(function* (entry: VmEntry) {
        const staging = dirOf(stagingName(entry.id, entry.owner))
        yield* fs.makeDirectory(vmsDir, { recursive: true, mode: 0o700 })
        yield* fs.makeDirectory(staging, { mode: 0o700 })
        const text = yield* Effect.orDie(Schema.encode(Schema.parseJson(VmEntry))(entry))
        yield* fs.writeFileString(path.join(staging, "entry.json"), text).pipe(
          Effect.zipRight(fs.rename(staging, dirOf(entry.id))),
          // the write fails on a full disk
          Effect.onError(() => Effect.ignore(fs.remove(staging, { recursive: true, force: true })))
        )
      })

      /** Removes what is left of a VM, unless its shim is alive. */
      const forget = Effect.fnUntraced(function* (id: VmId) {
        const entry = yield* readEntry(id)
        if (Option.isSome(entry)) {
          const ours = entry.value.shim === undefined && entry.value.owner.pid === me.pid
          if (!ours && (yield* isLive(entry.value))) return
          if (entry.value.name !== undefined) yield* dropName(entry.value.name, id)
        }
        yield* Effect.ignore(fs.remove(dirOf(id), { recursive: true, force: true }))
      })

      const names = (dir: string) => fs.readDirectory(dir).pipe(fallbackWhen("NotFound", noStrings))

      const list = Effect.gen(function* () {
        const ids = (yield* names(vmsDir)).filter(Schema.is(VmId))
        const entries = yield* Effect.forEach(ids, readLive, { concurrency: 16 })
        return entries.flatMap(Option.toArray).sort((a, b) => a.createdAt - b.createdAt)
      }).pipe(Effect.mapError(unreadable(vmsDir)), Effect.withSpan("Registry.list"))

      /** Directories of dead VMs and dead starters, with the name in their entry. */
      const deadDirs = Effect.gen(function* () {
        const found: Array<{ readonly id: string; readonly name: string | undefined; readonly path: string }> = []
        for (const dir of yield* names(vmsDir)) {
          if (Schema.is(VmId)(dir)) {
            if (Option.isSome(yield* readLive(dir))) continue
            const entry = yield* readEntry(dir)
            found.push({ id: dir, name: Option.getOrUndefined(entry)?.name, path: dirOf(dir) })
          } else {
            const starter = parseStagingName(dir)
            if (starter === undefined || (yield* processes.isAlive(starter))) continue
            found.push({ id: dir.split(".")[1] ?? dir, name: undefined, path: dirOf(dir) })
          }
        }
        return found
      })

      /** Pins whose VM is not alive. */
      const deadPins = Effect.gen(function* () {
        const found: Array<{ readonly id: string; readonly name: string; readonly path: string }> = []
        for (const file of yield* names(namesDir)) {
          const name = nameOf(file)
          if (Option.isSome(yield* holder(name))) continue
          found.push({ id: Option.getOrElse(yield* readPin(name), () => ""), name, path: path.join(namesDir, file) })
        }
        return found
      })

      const reconcile = Effect.fn("Registry.reconcile")(
        function* (options?: { readonly dryRun?: boolean }) {
          // Pins first: a starter writes its entry before its pin, so a pin that is there without an entry is stale.
          const pins = (yield* names(namesDir)).length === 0 ? [] : yield* deadPins
          const dirs = yield* deadDirs
          if (pins.length === 0 && dirs.length === 0) return []
          const remove = Effect.fnUntraced(function* (leftover: {
            id: string
            name: string | undefined
            path: string
          }) {
            const removed =
              options?.dryRun === true ||
              (yield* Effect.isSuccess(fs.remove(leftover.path, { recursive: true, force: true })))
            return {
              id: leftover.id,
              ...given({ name: leftover.name }),
              removedPaths: removed ? [leftover.path] : [],
              failedPaths: removed ? [] : [leftover.path]
            }
          })
          return yield* HostLock.withLock(
            `${namesDir}.lock`,
            identity
          )(
            Effect.gen(function* () {
              // read again under the lock: a live VM may have taken a pin meanwhile
              const stale = pins.length === 0 ? [] : yield* deadPins
              return yield* Effect.forEach([...stale, ...dirs], remove)
            })
          )
        },
        Effect.mapError(unreadable(vmsDir))
      )

      return Registry.of({
        claim: Effect.fn("Registry.claim")(function* (entry) {
          yield* Effect.acquireRelease(Effect.mapError(createDir(entry), unreadable(vmsDir)), () => forget(entry.id))
          if (entry.name === undefined) return []
          yield* takeName(entry.name, entry.id).pipe(
            Effect.mapError((e) => (e._tag === "RegistryError" ? e : unreadable(namesDir)(e)))
          )
          return [pinOf(entry.name)]
        }),
        assign: Effect.fn("Registry.assign")(function* (id, candidates, rename) {
          for (const name of candidates) {
            if (Option.isSome(yield* holder(name))) continue
            yield* rename(name, pinOf(name))
            const taken = yield* takeName(name, id).pipe(
              Effect.as(true),
              Effect.catchIf(
                (e) => e._tag === "RegistryError",
                () => Effect.succeed(false)
              ),
              Effect.mapError(unreadable(namesDir))
            )
            if (taken) return Option.some(name)
            yield* rename(null, null)
          }
          return Option.none<VmName>()
        }),
        scratch: Effect.acquireRelease(
          Effect.gen(function* () {
            const dir = dirOf(stagingName(randomBytes(6).toString("hex"), me))
            yield* fs.makeDirectory(vmsDir, { recursive: true, mode: 0o700 })
            yield* fs.makeDirectory(dir, { mode: 0o700 })
            return dir
          }).pipe(Effect.mapError(unreadable(vmsDir))),
          (dir) => Effect.ignore(fs.remove(dir, { recursive: true, force: true }))
        ),
        list,
        find: Effect.fn("Registry.find")(function* (reference) {
          // The pin decides which VM has a name: of several that want it at once, all but one are about to fail.
          const named = yield* holder(reference)
          if (Option.isSome(named)) return named.value
          const all = yield* list
          const isPid = /^[0-9]+$/.test(reference)
          const found = all.filter((entry) =>
            isPid
              ? [entry.vmm?.pid, entry.shim?.pid].includes(Number(reference))
              : reference.length >= 4 && entry.id.startsWith(reference)
          )
          const [entry] = found
          if (entry === undefined || found.length > 1) return yield* notFound(reference, all, found)
          return entry
        }),
        reconcile
      })
    })
  )
}

/** The VM's name behind a pin's file name. A file name that cannot be decoded stands for itself. */
const nameOf = (file: string): string => {
  try {
    return decodeURIComponent(file)
  } catch {
    return file
  }
}

const noStrings: ReadonlyArray<string> = []

const filterEffect =
  <A>(keep: (a: A) => Effect.Effect<boolean>) =>
  (option: Option.Option<A>): Effect.Effect<Option.Option<A>> =>
    Option.match(option, {
      onNone: () => Effect.succeedNone,
      onSome: (a) => Effect.map(keep(a), (yes) => (yes ? option : Option.none()))
    })

const fallbackWhen =
  <B>(reason: PlatformErrors.SystemErrorReason, fallback: B) =>
  <A, R>(effect: Effect.Effect<A, PlatformErrors.PlatformError, R>) =>
    Effect.catchIf(
      effect,
      (e) => e._tag === "SystemError" && e.reason === reason,
      () => Effect.succeed(fallback)
    )

const unreadable = (dir: string) => (cause: PlatformErrors.PlatformError) =>
  new RegistryError({
    code: "REGISTRY_IO",
    message: `the registry cannot be read or written: ${cause.message}`,
    hint: `check the owner, the permissions and the free space of ${dir}, or set MACHINEN_HOME`,
    cause
  })

const nameInUse = (name: string, entry: VmEntry) =>
  new RegistryError({
    code: "REGISTRY_NAME_IN_USE",
    message: `the name "${name}" belongs to a running VM (id ${entry.id}, pid ${entry.vmm?.pid ?? "not known yet"})`,
    hint: `stop it with \`machinen stop ${name}\`, or choose another name`
  })

const notFound = (reference: string, all: ReadonlyArray<VmEntry>, found: ReadonlyArray<VmEntry>) =>
  new RegistryError({
    code: "REGISTRY_VM_NOT_FOUND",
    message:
      found.length > 1
        ? `"${reference}" is the beginning of ${found.length} ids: ${found.map((e) => e.id).join(", ")}`
        : `no running VM has the name, id or pid "${reference}"`,
    hint: all.length === 0 ? "no VM is running" : `running: ${all.map((e) => e.label).join(", ")}`
  })

/** `.<id>.<pid>.<start time>`: names the process that makes the directory, so that leftovers of dead ones can be recognised. */
const stagingName = (id: string, owner: ProcessIdentity) => `.${id}.${owner.pid}.${owner.startTime}`

const parseStagingName = (dir: string): ProcessIdentity | undefined => {
  const match = /^\.[0-9a-f]{12}\.([0-9]+)\.([0-9]+)$/.exec(dir)
  return match === null ? undefined : { pid: Number(match[1]), startTime: Number(match[2]) }
}
