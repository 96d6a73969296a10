package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
)

const (
	// header is an Ethernet frame's: two addresses and a type. The library reads it without looking whether it is there.
	header = 14
	// largest is what a virtio card can send: 64 KiB of payload (virtio 5.1.6.3), its header, and a VLAN's tag.
	largest = 65536 + header + 4
)

// checkedConn lets whole frames of possible lengths through. The guest decides what stands in the stream.
type checkedConn struct {
	net.Conn
	reader *bufio.Reader
	// left of the frame that is being read, its length field included.
	left int
}

func checked(card net.Conn) net.Conn {
	return &checkedConn{Conn: card, reader: bufio.NewReaderSize(card, 128<<10)}
}

func (c *checkedConn) Read(into []byte) (int, error) {
	for c.left == 0 {
		length, err := c.reader.Peek(4)
		if err != nil {
			return 0, err
		}
		size := binary.BigEndian.Uint32(length)
		switch {
		case size > largest:
			return 0, fmt.Errorf("a frame of %d bytes: %w", size, io.ErrUnexpectedEOF)
		case size < header:
			if _, err := c.reader.Discard(4 + int(size)); err != nil {
				return 0, err
			}
		default:
			c.left = 4 + int(size)
		}
	}
	if len(into) > c.left {
		into = into[:c.left]
	}
	n, err := c.reader.Read(into)
	c.left -= n
	return n, err
}
