const blockSize = 512

/** A field of a header: the number in octal, then a space and NUL, in `width` bytes. */
const octal = (value: number, width: number): string => `${value.toString(8).padStart(width - 2, "0")} \0`

/**
 * Header and content of one file as they stand in a tar archive (ustar of POSIX.1): mode 0644, owned by root, mtime 0. The name has at most
 * 100 bytes.
 */
export const tarEntry = (name: string, content: Uint8Array): Uint8Array => {
  const padded = Buffer.alloc(blockSize + Math.ceil(content.length / blockSize) * blockSize)
  const put = (text: string, at: number) => padded.write(text, at, "latin1")
  padded.write(name, 0, 100)
  put(octal(0o644, 8) + octal(0, 8) + octal(0, 8) + octal(content.length, 12) + octal(0, 12), 100)
  // the checksum is computed over a header that has spaces in the checksum's field
  put(`${" ".repeat(8)}0`, 148)
  put("ustar\x0000", 257)
  put(octal(0, 8) + octal(0, 8), 329)
  const checksum = padded.subarray(0, blockSize).reduce((sum, byte) => sum + byte, 0)
  put(octal(checksum, 8), 148)
  padded.set(content, blockSize)
  return padded
}
