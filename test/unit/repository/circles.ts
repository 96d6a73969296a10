/** The first circle that is found from each file on, as the files it leads through. */
export const circles = (
  files: Iterable<string>,
  importsOf: (file: string) => Iterable<string>
): ReadonlyArray<string> => {
  const found: Array<string> = []
  const done = new Set<string>()
  const visit = (file: string, trail: ReadonlyArray<string>) => {
    const at = trail.indexOf(file)
    if (at >= 0) found.push([...trail.slice(at), file].join(" -> "))
    if (at >= 0 || done.has(file)) return
    for (const target of importsOf(file)) visit(target, [...trail, file])
    done.add(file)
  }
  for (const file of files) visit(file, [])
  return found
}
