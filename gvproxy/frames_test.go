package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand"
	"net"
	"testing"
	"testing/iotest"
)

// stream is a connection that can only be read.
type stream struct {
	net.Conn
	io.Reader
}

func (s stream) Read(into []byte) (int, error) { return s.Reader.Read(into) }

func framed(size int) []byte {
	frame := binary.BigEndian.AppendUint32(nil, uint32(size))
	return append(frame, bytes.Repeat([]byte{byte(size)}, size)...)
}

func TestOnlyFramesWithAHeaderPass(t *testing.T) {
	random := rand.New(rand.NewSource(1))
	for round := range 50 {
		var sent, wanted []byte
		for range 40 {
			size := random.Intn(40)
			sent = append(sent, framed(size)...)
			if size >= header {
				wanted = append(wanted, framed(size)...)
			}
		}
		var reader io.Reader = bytes.NewReader(sent)
		if round%2 == 0 {
			reader = iotest.OneByteReader(reader)
		}
		got, err := io.ReadAll(checked(stream{Reader: reader}))
		if err != nil || !bytes.Equal(got, wanted) {
			t.Fatalf("round %d: %v, %d bytes instead of %d", round, err, len(got), len(wanted))
		}
	}
}

func TestTheLargestFramePassesAndALargerOneEndsTheStream(t *testing.T) {
	got, err := io.ReadAll(checked(stream{Reader: bytes.NewReader(framed(largest))}))
	if err != nil || len(got) != 4+largest {
		t.Fatal(err, len(got))
	}
	for _, size := range []uint32{largest + 1, 1 << 31, 1<<32 - 1} {
		length := binary.BigEndian.AppendUint32(nil, size)
		if _, err := io.ReadAll(checked(stream{Reader: bytes.NewReader(length)})); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatal(size, err)
		}
	}
}

func TestForwardsAreAnInheritedDescriptorAndAPort(t *testing.T) {
	for _, text := range []string{"", "4", "4=", "=80", "4=70000", "-1=80", "4:80", "65536=80", "9999=80"} {
		var parsed forwards
		if parsed.Set(text) == nil {
			t.Errorf("%q was taken", text)
		}
	}
}
