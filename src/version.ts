/** Of this release; package.json's is the same (a test holds it). */
export const version = "0.1.0"
