import { Schema } from "effect"

/** The id of an image in the store: the sha256 of its source (the bytes of a tarball or disk, the manifest of a container image). */
export const ImageId = Schema.String.pipe(Schema.pattern(/^[0-9a-f]{64}$/), Schema.brand("ImageId"))
export type ImageId = typeof ImageId.Type

const component = "[a-z0-9]+(?:(?:[.]|_{1,2}|-+)[a-z0-9]+)*"
const namePattern = new RegExp(`^${component}(?:/${component})*(?::[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?$`)

/** The name of an image: `web`, `team/web:1.2`. Names that could be an id are refused. */
export const ImageName = Schema.String.pipe(
  Schema.filter((name) => name.length <= 200 && namePattern.test(name) && !/^[0-9a-f]{6,64}$/.test(name)),
  Schema.brand("ImageName")
)
export type ImageName = typeof ImageName.Type

/** Adds `:latest` to a name without a tag. */
export const withTag = (name: string): string => (/:[^/]*$/.test(name) ? name : `${name}:latest`)

/** `<id>.json`: the source of an image in the store. */
export class ImageRecord extends Schema.Class<ImageRecord>("ImageRecord")({
  format: Schema.Literal(1),
  id: ImageId,
  /** The reference or path by which the image was added. */
  source: Schema.String,
  /** Unix milliseconds. */
  builtAt: Schema.Number
}) {}
