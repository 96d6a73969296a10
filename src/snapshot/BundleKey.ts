import { createHmac, randomBytes, timingSafeEqual } from "node:crypto"
import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect, identity, Option } from "effect"
import * as HostLock from "../platform/HostLock.ts"
import { Settings } from "../Settings.ts"

/**
 * The user's own key, with which the manifests of this user's bundles are signed: `<home>/bundle.key`, 32 random bytes that nobody else may
 * read. Whoever has it can make bundles that restore here as they say.
 */
const keyFile = "bundle.key"
const keyBytes = 32
/** Permission bits of the group and of others. */
const othersBits = 0o077

const keyPath = Effect.map(Settings, ({ home }) => path.join(home, keyFile))

/** The key, if there is a sound one that is the user's alone. */
const find = Effect.gen(function* () {
  const fs = yield* FileSystem.FileSystem
  const file = yield* keyPath
  const { mode, size, type } = yield* fs.stat(file)
  if (type !== "File" || Number(size) !== keyBytes || (mode & othersBits) !== 0) return Option.none<Uint8Array>()
  return Option.some(yield* fs.readFile(file))
})

const findOrNone = Effect.orElseSucceed(find, () => Option.none<Uint8Array>())

/** The key, made if there is none yet. One that is there and cannot be used is not replaced: older bundles are signed with it. */
const findOrMake = Effect.gen(function* () {
  const fs = yield* FileSystem.FileSystem
  const file = yield* keyPath
  yield* fs.makeDirectory(path.dirname(file), { recursive: true, mode: 0o700 })
  const make = Effect.gen(function* () {
    // the key has its name when all of it is on disk; a killed maker's draft is replaced
    const draft = `${file}.draft`
    yield* fs.remove(draft, { force: true })
    yield* Effect.scoped(
      Effect.gen(function* () {
        const handle = yield* fs.open(draft, { flag: "wx", mode: 0o600 })
        yield* handle.writeAll(randomBytes(keyBytes))
        yield* handle.sync
      })
    )
    yield* fs.rename(draft, file)
  })
  const missing = Effect.map(fs.exists(file), (isThere) => !isThere)
  yield* Effect.whenEffect(HostLock.withLock(`${file}.lock`, identity)(Effect.whenEffect(make, missing)), missing)
  const key = yield* find
  if (Option.isNone(key)) {
    return yield* Effect.fail(
      new Error(`${file} is not a key: a file of ${keyBytes} bytes that its owner alone may read (chmod 600)`)
    )
  }
  return key.value
})

const hmac = (key: Uint8Array, text: string) => createHmac("sha256", key).update(text).digest()

/** Signs a text with the user's key. */
export const sign = (text: string) => Effect.map(findOrMake, (key) => hmac(key, text).toString("hex"))

/** Whether this user's key signed the text. */
export const isSignedBy = (text: string, mac: string) =>
  Effect.map(findOrNone, (key) => {
    const stated = Buffer.from(mac, "hex")
    const isRight = (ours: Buffer) => stated.length === ours.length && timingSafeEqual(stated, ours)
    return Option.isSome(key) && isRight(hmac(key.value, text))
  })
