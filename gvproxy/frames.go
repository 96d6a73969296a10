package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
)

const (
	// header is the length of an Ethernet header: two addresses and a type. The library reads it without checking the frame's length.
	header = 14
	// largest is the longest frame that a virtio card can send: 64 KiB of payload (virtio 5.1.6.3), the header, and a VLAN tag.
	largest = 65536 + header + 4
)

// checkedConn passes frames of valid lengths on: it drops frames that are too short, and fails on one that is too long. The guest is not trusted.
type checkedConn struct {
	net.Conn
	reader *bufio.Reader
	// left is the number of bytes of the current frame that have not been read, its length field included.
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
