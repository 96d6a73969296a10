import { Schema } from "effect"

/** An image in the store: the sha256 of what it was made from (a tarball's or disk's bytes, a container image's manifest). */
export const ImageId = Schema.String.pipe(Schema.pattern(/^[0-9a-f]{64}$/), Schema.brand("ImageId"))
export type ImageId = typeof ImageId.Type

const component = "[a-z0-9]+(?:(?:[.]|_{1,2}|-+)[a-z0-9]+)*"
const namePattern = new RegExp(`^${component}(?:/${component})*(?::[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?$`)

/** What a user calls an image: `web`, `team/web:1.2`. Not what could be an id. */
export const ImageName = Schema.String.pipe(
  Schema.filter((name) => name.length <= 200 && namePattern.test(name) && !/^[0-9a-f]{6,64}$/.test(name)),
  Schema.brand("ImageName")
)
export type ImageName = typeof ImageName.Type

/** `web` is `web:latest`. */
export const withTag = (name: string): string => (/:[^/]*$/.test(name) ? name : `${name}:latest`)

/** `<id>.json`: where an image in the store came from. */
export class ImageRecord extends Schema.Class<ImageRecord>("ImageRecord")({
  format: Schema.Literal(1),
  id: ImageId,
  /** As its user called it. */
  source: Schema.String,
  /** Unix milliseconds. */
  builtAt: Schema.Number
}) {}
