import { createHmac, randomBytes, timingSafeEqual } from "node:crypto"
import * as path from "node:path"
import { FileSystem } from "@effect/platform"
import { Effect, identity, Option } from "effect"
import * as HostLock from "../platform/HostLock.ts"
import { Settings } from "../Settings.ts"

/**
 * The user's key, which signs the manifests of this user's bundles: `<home>/bundle.key`, 32 random bytes that no other user may read. A holder of
 * the key can make bundles that count as this user's own.
 */
const keyFile = "bundle.key"
const keyBytes = 32
/** Permission bits of the group and of others. */
const groupAndOtherBits = 0o077

const keyPath = Effect.map(Settings, ({ home }) => path.join(home, keyFile))

/** The key; `None` when the file is not a key, or others can read it. */
const find = Effect.gen(function* () {
  const fs = yield* FileSystem.FileSystem
  const file = yield* keyPath
  const { mode, size, type } = yield* fs.stat(file)
  if (type !== "File" || Number(size) !== keyBytes || (mode & groupAndOtherBits) !== 0) return Option.none<Uint8Array>()
  return Option.some(yield* fs.readFile(file))
})

const findOrNone = Effect.orElseSucceed(find, () => Option.none<Uint8Array>())

/** The key, which is made if there is none. An existing key that cannot be used is not replaced: older bundles are signed with it. */
const findOrMake = Effect.gen(function* () {
  const fs = yield* FileSystem.FileSystem
  const file = yield* keyPath
  yield* fs.makeDirectory(path.dirname(file), { recursive: true, mode: 0o700 })
  const make = Effect.gen(function* () {
    // renamed once it is on disk; the draft of a killed maker is replaced
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

/** HMAC-SHA256 of a text under the user's key, in hexadecimal digits. */
export const sign = (text: string) => Effect.map(findOrMake, (key) => hmac(key, text).toString("hex"))

/** Whether this user's key signed the text. */
export const isSignedBy = (text: string, mac: string) =>
  Effect.map(findOrNone, (key) => {
    const stated = Buffer.from(mac, "hex")
    const isRight = (ours: Buffer) => stated.length === ours.length && timingSafeEqual(stated, ours)
    return Option.isSome(key) && isRight(hmac(key.value, text))
  })
